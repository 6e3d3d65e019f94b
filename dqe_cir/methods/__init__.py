"One module per system; `METHODS` is the list of them."
from dqe_cir.methods.zoo import METHODS
