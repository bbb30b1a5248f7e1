"""The staged pipeline as Luigi tasks: `luigi --module pipeline.tasks TrainDiVE`."""
