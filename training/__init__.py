"""Training of policies with torch: supervised fine-tuning and GRPO."""

import logging

# Silence what vLLM and torch log at import on a machine without a GPU; their own log settings come too
# late for that.
logging.getLogger("vllm").addHandler(logging.NullHandler())
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
