"""The torch world: supervised and reinforcement training of policies."""

import logging

# What libraries say while they are imported on a machine without a GPU is no news; vLLM's and torch's own
# settings of their logs come too late for it.
logging.getLogger("vllm").addHandler(logging.NullHandler())
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
