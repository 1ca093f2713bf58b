"""SimSiam's two heads (Chen & He, CVPR 2021, section 3), for copies that are trained by its loss."""

from torch import Tensor, nn


class SimSiamHeads(nn.Module):
    """A projector and a predictor that a copy is trained through; its evaluation leaves them out.

    The projector takes rows (B, width), a copy's features or a victim's answers, to (B, dim) by three layers, each with
    a BatchNorm, the last of which is not affine; the predictor takes these to (B, dim) by two layers.
    """

    checkpoint_key = "companion"

    def __init__(self, width: int, dim: int = 512):
        super().__init__()
        self.projector = nn.Sequential(
            nn.Linear(width, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, dim, bias=False),
            nn.BatchNorm1d(dim, affine=False),
        )
        self.predictor = nn.Sequential(
            nn.Linear(dim, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU(), nn.Linear(dim, dim)
        )

    def project(self, rows: Tensor) -> Tensor:
        return self.projector(rows)

    def predict(self, rows: Tensor) -> Tensor:
        return self.predictor(self.projector(rows))
