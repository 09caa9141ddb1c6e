"""The instance types of SageMaker with GPUs, and the memory of each GPU that CUDA can use."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20
# Part of the GPU memory in EC2's description that CUDA reports as its total, at least. Torch's messages have 22.06 GiB
# for A10G, 44.4 for L40S, 79.1 for H100, and 14.56 for T4, whose error correction takes memory.
CUDA_SHARE = 0.985
CUDA_SHARE_T4 = 0.91


@dataclass(frozen=True)
class InstanceType:
    """An instance type. Each of its GPUs has `gpu_mib` and runs one engine; the engines share the RAM equally."""

    name: str
    gpu: str
    gpu_mib: int
    ram_gib: int
    gpus: int = 1

    @property
    def cuda_bytes(self) -> int:
        """The memory that CUDA reports for one GPU."""
        return int(self.gpu_mib * MIB * (CUDA_SHARE_T4 if self.gpu == "T4" else CUDA_SHARE))


# Source: EC2's DescribeInstanceTypes of the type without "ml.": GpuInfo.Gpus and MemoryInfo.SizeInMiB.
INSTANCES = (
    InstanceType("ml.g4dn.xlarge", "T4", 16384, 16),
    InstanceType("ml.g4dn.2xlarge", "T4", 16384, 32),
    InstanceType("ml.g4dn.12xlarge", "T4", 16384, 192, 4),
    InstanceType("ml.g5.xlarge", "A10G", 22888, 16),
    InstanceType("ml.g5.2xlarge", "A10G", 22888, 32),
    InstanceType("ml.g5.4xlarge", "A10G", 22888, 64),
    InstanceType("ml.g5.8xlarge", "A10G", 22888, 128),
    InstanceType("ml.g5.12xlarge", "A10G", 22888, 192, 4),
    InstanceType("ml.g5.24xlarge", "A10G", 22888, 384, 4),
    InstanceType("ml.g5.48xlarge", "A10G", 22888, 768, 8),
    InstanceType("ml.g6.xlarge", "L4", 22888, 16),
    InstanceType("ml.g6.2xlarge", "L4", 22888, 32),
    InstanceType("ml.g6.4xlarge", "L4", 22888, 64),
    InstanceType("ml.g6.8xlarge", "L4", 22888, 128),
    InstanceType("ml.g6.12xlarge", "L4", 22888, 192, 4),
    InstanceType("ml.g6.24xlarge", "L4", 22888, 384, 4),
    InstanceType("ml.g6.48xlarge", "L4", 22888, 768, 8),
    InstanceType("ml.g6e.xlarge", "L40S", 45776, 32),
    InstanceType("ml.g6e.2xlarge", "L40S", 45776, 64),
    InstanceType("ml.g6e.4xlarge", "L40S", 45776, 128),
    InstanceType("ml.g6e.12xlarge", "L40S", 45776, 384, 4),
    InstanceType("ml.g6e.24xlarge", "L40S", 45776, 768, 4),
    InstanceType("ml.g6e.48xlarge", "L40S", 45776, 1536, 8),
    InstanceType("ml.g7.2xlarge", "RTX PRO 4500", 32768, 32),
    InstanceType("ml.g7.4xlarge", "RTX PRO 4500", 32768, 64),
    InstanceType("ml.g7.8xlarge", "RTX PRO 4500", 32768, 128),
    InstanceType("ml.g7.12xlarge", "RTX PRO 4500", 32768, 192, 2),
    InstanceType("ml.g7.24xlarge", "RTX PRO 4500", 32768, 384, 4),
    InstanceType("ml.g7.48xlarge", "RTX PRO 4500", 32768, 768, 8),
    InstanceType("ml.g7e.2xlarge", "RTX PRO Server 6000", 98304, 64),
    InstanceType("ml.g7e.4xlarge", "RTX PRO Server 6000", 98304, 128),
    InstanceType("ml.g7e.8xlarge", "RTX PRO Server 6000", 98304, 256),
    InstanceType("ml.g7e.12xlarge", "RTX PRO Server 6000", 98304, 512, 2),
    InstanceType("ml.g7e.24xlarge", "RTX PRO Server 6000", 98304, 1024, 4),
    InstanceType("ml.g7e.48xlarge", "RTX PRO Server 6000", 98304, 2048, 8),
    InstanceType("ml.p4d.24xlarge", "A100", 40960, 1152, 8),
    InstanceType("ml.p4de.24xlarge", "A100", 81920, 1152, 8),
    InstanceType("ml.p5.4xlarge", "H100", 81920, 256),
    InstanceType("ml.p5.48xlarge", "H100", 81920, 2048, 8),
    InstanceType("ml.p5e.48xlarge", "H200", 144384, 2048, 8),
    InstanceType("ml.p5en.48xlarge", "H200", 144384, 2048, 8),
    InstanceType("ml.p6-b200.48xlarge", "B200", 183359, 2048, 8),
)
