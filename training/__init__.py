"""Training of policies with torch: supervised fine-tuning and GRPO."""

import gc
import logging
import sys

# Silence what vLLM and torch log at import on a machine without a GPU; their own log settings come too
# late for that.
logging.getLogger("vllm").addHandler(logging.NullHandler())
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

# `python -m training.grpo recipe.json` imports this before its module. What a stage imports stays, and takes
# a fifth less time while no garbage is collected. `tasks.runtime.command.main` has it collected again.
if sys.argv[:1] == ["-m"] and sys.orig_argv[-1].endswith(".json"):
    gc.disable()
