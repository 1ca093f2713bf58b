"""A plane map of an encoder's representations, for a picture beside those of other encoders."""

import torch.nn.functional as F
from torch import Tensor

from utils import UserError

FEWEST = 10  # images that make a map


def plane_map(h: Tensor, seed: int = 0) -> list[list[float]]:
    """A t-SNE (van der Maaten & Hinton, JMLR 2008) of representations (N, D): N points (x, y), in [-1, 1].

    Near images, by the cosine of their representations, stay near; the axes have no meaning. UserError for fewer than
    FEWEST images.
    """
    from sklearn.manifold import TSNE  # here: it takes a second to import

    if len(h) < FEWEST:
        raise UserError(f"{len(h)} images are too few for a map: give {FEWEST} or more")
    # Of rows of unit length the squared distance is twice the cosine distance.
    rows = F.normalize(h.double(), dim=1).cpu().numpy()
    perplexity = min(30.0, (len(h) - 1) / 3)
    points = TSNE(perplexity=perplexity, init="pca", random_state=seed, n_jobs=1).fit_transform(rows)
    points = (points - points.mean(axis=0)) / abs(points - points.mean(axis=0)).max()
    return [[round(float(x), 3), round(float(y), 3)] for x, y in points]
