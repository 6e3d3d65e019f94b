"BLIP-2 and the other backbones behind one small class, and the tokens they leave on disk."
from dqe_cir.encoder.blip2 import Blip2Encoder, MINI, cross_attention, from_lavis, load_encoder
from dqe_cir.encoder.token_cache import TokenCache
from dqe_cir.encoder.tokens import cache_tokens
from dqe_cir._moved import old_name


def __getattr__(name): return old_name("encoder", name)
