"""The staged pipeline as Luigi tasks: `luigi --module pipeline.tasks TrainDiVE`."""

import sys

if "luigi" not in sys.modules:  # which would read luigi.cfg first
    from pipeline.config_files import require_readable

    require_readable()
