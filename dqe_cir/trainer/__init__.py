"Parameters, batches, run folders, one step, the loop."
from dqe_cir.trainer.config import TrainConfig, train_config
from dqe_cir.trainer.mining import NegativePool
from dqe_cir.trainer.batches import TrainingSet, training_set
from dqe_cir.trainer.runs import Run, build_method, load_run, open_run, read_config
from dqe_cir.trainer.loop import fit, smoke_run
from dqe_cir.trainer.evaluation_config import EvaluateConfig, evaluation_config, evaluation_protocol
from dqe_cir.trainer.evaluation_config import training_origin
from dqe_cir.trainer.check import check_method
from dqe_cir._moved import old_name


def __getattr__(name): return old_name("trainer", name)
