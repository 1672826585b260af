"""Ends while asynchronous collectives are still under way, and without destroying its process group."""

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("gloo")
tensors = [torch.ones(300_000) for _ in range(64)]
pending = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
pending[0].wait()
