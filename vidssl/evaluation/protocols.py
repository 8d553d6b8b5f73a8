"""The kinds of probes."""

from vidssl.evaluation.clip_sets import ClipSet
from vidssl.evaluation.heads import Attentive, Linear
from vidssl.evaluation.neighbours import Knn, Retrieval

PROTOCOLS = {
    "attentive": Attentive,
    "linear": Linear,
    "knn": Knn,
    "retrieval": Retrieval,
    "clip_set": ClipSet,
}
