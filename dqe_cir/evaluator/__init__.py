"Rank the gallery for every query by the rules of each benchmark, and write the servers' files."
from dqe_cir.evaluator.protocols import PROTOCOLS, Protocol, protocol_for
from dqe_cir.evaluator.scoring import Evaluation, GalleryScores, breakdown, encode_gallery, encode_queries
from dqe_cir.evaluator.scoring import evaluate, evaluate_scores, score_dataset
from dqe_cir.evaluator.reference_points import ImageOnly, LateFusion, TextOnly, oracle, reference_points
from dqe_cir.evaluator.submissions import circo_submission, cirr_submission, submissions, write_submission
from dqe_cir.evaluator.preference import evaluate_preferences
from dqe_cir._moved import old_name


def __getattr__(name): return old_name("evaluator", name)
