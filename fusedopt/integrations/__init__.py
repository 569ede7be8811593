"""What trainers need beyond an ordinary optimizer: parameter groups of a model, arguments for transformers.Trainer."""

from fusedopt.integrations.groups import keep_embeddings_fp32, parameter_groups
from fusedopt.integrations.hf import trainer_kwargs

__all__ = ["keep_embeddings_fp32", "parameter_groups", "trainer_kwargs"]
