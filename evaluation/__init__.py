"""How good an encoder is, how close a copy is to its victim, whether it was stolen, and who attacks.

represent   representations by a frozen encoder      user       what a paying user loses under a defence
probes      classifiers of representations           ownership  is this encoder stolen? (verdict: the answer in words)
fidelity    how close a copy is to its victim        streams    attackers' and users' streams of queries
released    the protocol of the 2022 code            encoders   which encoder is judged, and compared with which
test_images which test images may be used            statistics tests behind a claim, and the ROC
watching    a detector's scores of the streams
candidates  which encoders verify.py tests           alignment  turning a copy's dimensions into the victim's

The names exported here take tensors and encoders only; scripts import the other modules by name.
"""

from evaluation.fidelity import agreement, compare, fidelity, linear_cka, neighbour_overlap
from evaluation.probes import (
    Classifier,
    Labelled,
    Space,
    evaluate,
    knn_accuracy,
    linear_probe,
    logistic_regression,
    mlp_probe,
    represent_both,
    top1_top5,
    topk_accuracy,
)
from evaluation.released import released_probe
from evaluation.test_images import count_queried, load_test
from training.represent import frozen, represent, represent_batch

__all__ = [
    "Classifier",
    "Labelled",
    "Space",
    "agreement",
    "compare",
    "count_queried",
    "evaluate",
    "fidelity",
    "frozen",
    "knn_accuracy",
    "linear_cka",
    "linear_probe",
    "load_test",
    "logistic_regression",
    "mlp_probe",
    "neighbour_overlap",
    "released_probe",
    "represent",
    "represent_batch",
    "represent_both",
    "top1_top5",
    "topk_accuracy",
]
