__version__ = "0.2.0"
from dqe_cir import _moved  # import paths of version 0.1
