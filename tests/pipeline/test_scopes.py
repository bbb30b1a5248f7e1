"""Sections of one dataset or one method: which there can be."""

import re

import pytest

from pipeline.settings import SettingsError
from tests.pipeline.cli.test_plan import recipe, train  # noqa: F401  the first is a fixture
from tests.pipeline.test_stage import config  # noqa: F401  a fixture


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[Train:cub]\nstep = 7\n", "section [Train:cub] has no key 'step'; did you mean steps?"),
        ("[Tain:cub]\nsteps = 7\n", "unknown section [Tain]; did you mean Train?"),
        ("[engine:cub]\ndtype = auto\n", "section [engine:cub]: engine has no settings by dataset"),
        ("[Train:cub+beetles]\nsteps = 7\n", "write [Train:beetles+cub]"),
        ("[Train:cbu]\nsteps = 7\n", "[Train:cbu]: no data card and no method is named 'cbu'"),
        ("[Train:viirft]\nsteps = 7\n", "is named 'viirft'; did you mean virft?"),
        (
            "[Train:sft+virft]\nsteps = 7\n",
            "[Train:sft+virft]: sft is a method, and methods cannot",
        ),
        ("[Train:cub+virft]\nsteps = 7\n", "virft is a method, and methods cannot be joined"),
        ("[Train:zero_shot]\nsteps = 7\n", "zero_shot is the base policy, which is never trained"),
        (
            "[Propose:zero_shot]\nlimit = 7\n",
            "zero_shot is the base policy, which is never trained",
        ),
        ("[Evaluate:cbu]\nlimit = 7\n", "is named 'cbu'; did you mean cub?"),
        ("[Split:virft]\nshots = 4\n", "[Split:virft]: Split is the same for all methods"),
        (
            "[Evaluate:virft]\npart = val\n",
            "[Evaluate:virft]: Evaluate is the same for all methods",
        ),
        ("[Evaluate:zero_shot]\nlimit = 7\n", "Evaluate is the same for all methods"),
        ("[Judge:virft]\nmodel = m\n", "[Judge:virft]: Judge is the same for all methods"),
        ("[engine:virft]\ndtype = auto\n", "[engine:virft]: engine is the same for all methods"),
    ],
)
def test_a_section_that_can_hold_for_nothing_is_refused(recipe, text, told):
    recipe(text)
    with pytest.raises(SettingsError, match=re.escape(told)):
        train("cub")
