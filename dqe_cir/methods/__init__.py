"The systems, one module each, and the table that names them."
from dqe_cir.methods.base import Batch, Method
from dqe_cir.methods.zoo import METHODS
