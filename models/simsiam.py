"""SimSiam's two heads (Chen & He, CVPR 2021, section 3), for copies that are trained with its loss."""

from torch import Tensor, nn


class SimSiamHeads(nn.Module):
    """The projector and predictor through which a copy is trained; its evaluation leaves them out.

    The projector maps rows (B, width), a copy's features or a victim's answers, to (B, dim) by three layers, each with
    a BatchNorm (the last not affine); the predictor maps these to (B, dim) by two layers.
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
