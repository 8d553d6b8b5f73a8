"""The kinds of probes."""

from vidssl.evaluation.heads import Attentive, Linear
from vidssl.evaluation.neighbours import Knn, Retrieval

PROTOCOLS = {"attentive": Attentive, "linear": Linear, "knn": Knn, "retrieval": Retrieval}
