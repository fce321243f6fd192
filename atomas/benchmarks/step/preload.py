"""Everything that a measured process imports, imported once before it is forked."""

import deepspeed  # noqa: F401
import transformers  # noqa: F401
from transformers.models.t5 import modeling_t5  # noqa: F401

import atomas.benchmarks.step.ours
import atomas.benchmarks.step.published_step  # noqa: F401
import atomas_kernels  # noqa: F401
