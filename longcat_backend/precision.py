"""The precisions a component can be loaded in, one table."""

import torch

AUTO = "auto"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CHOICES = (AUTO, *DTYPES)
