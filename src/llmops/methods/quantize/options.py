"""Options of the quantization methods."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from llmops.options import Options

__all__ = ["BITS", "BITSANDBYTES", "FIXED", "KV_DTYPES", "KV_RECORD", "Auto", "Autoround", "Awq", "Calibrated", "Gptq",
           "Hqq", "KvCache", "KvDtype", "Quantize", "Rtn", "Scheme", "Smoothquant", "WeightOnly"]

Scheme = Literal["w8a16", "w4a16", "w3a16", "w2a16", "w8a8", "fp8", "mxfp4", "nvfp4"]
Integers = Literal["w8a16", "w4a16", "w3a16", "w2a16"]  # that layers of one model can be given each its own of
Scales = Literal["tensor", "channel", "block"]
Clip = Literal["absmax", "mse"]
Experts = Literal["routed", "all"]
KvDtype = Literal["int8", "fp8", "int4"]
KV_DTYPES: tuple[str, ...] = get_args(KvDtype)
KV_RECORD = "llmops_kv_cache"  # key of a config.json whose model keeps its keys and values so
KV_CACHE = "type that keys and values are kept in, with a scale for every token and head; default: that of activations"
BITS: dict[str, int] = {"w8a16": 8, "w4a16": 4, "w3a16": 3, "w2a16": 2, "w8a8": 8, "fp8": 8, "mxfp4": 4, "nvfp4": 4,
                        "nf4": 4, "llm_int8": 8}
#: Schemes that say all there is to say: weights that share a scale (-1 a row, for fp8 what `scales` says), symmetric.
FIXED = {"w8a8": -1, "fp8": -1, "mxfp4": 32, "nvfp4": 16}
BLOCK = 128
#: Schemes that bitsandbytes stores and runs.
BITSANDBYTES = ("nf4", "llm_int8")


_FACTORS = "awq: scale up the weights of large inputs first, the factors folded away as method awq does"


class WeightOnly(Options):
    """What every quantization of weights shares: bits, groups, which layers."""

    scheme: Scheme = Field(description="wNa16: integers of N bits, activations stay 16 bit. w8a8: int8, activations "
                                       "too, token by token. fp8: E4M3, activations too. mxfp4, nvfp4: E2M1 in groups "
                                       "of 32 or 16, activations stay 16 bit")
    scales: Scales | None = Field(None, description="for scheme fp8: one for the weight, for each row, or for each "
                                                    "block of 128 x 128 (activations then by 128, else by token). "
                                                    "Default: channel")
    group_size: int | None = Field(None, description="weights that share a scale along the input; -1 a whole row. "
                                                     "Default: -1 at 8 bits, 128 below. Only for wNa16")
    symmetric: bool = Field(True, description="false stores a zero point for every scale. Only for wNa16")
    ignore: list[str] = Field(["lm_head"], description="layers left in 16 bit, by the end of their name; [] quantizes "
                                                       "the head, too")
    embeddings: bool = Field(False, description="token embeddings in 8 bits, and with them a head that is tied to them")
    kv_cache: KvDtype | None = Field(None, description=KV_CACHE)
    rotate: Literal["hadamard"] | list[Literal["r1", "r2"]] | None = Field(
        None, description="rotate the weights before rounding, the function unchanged and nothing left to run "
                          "(Ashkboos et al. 2024): the stream between the blocks (r1), the values of each head (r2), "
                          "or both (hadamard)")

    @property
    def rotations(self) -> tuple[str, ...]:
        """The parts of `rotate`, none when it is left out."""
        return ("r1", "r2") if self.rotate == "hadamard" else tuple(self.rotate or ())

    @property
    def bits(self) -> int:
        return BITS[self.scheme]

    @property
    def number_format(self) -> str | None:
        """The kind of numbers, "w8a8", "fp8-channel" and so on; None for integers of any group size."""
        if self.scheme == "fp8":
            return f"fp8-{self.scales or 'channel'}"
        return self.scheme if self.scheme in FIXED else None

    @property
    def group(self) -> int:
        """The group size with its default filled in."""
        if self.scheme in FIXED:
            return BLOCK if self.scales == "block" else FIXED[self.scheme]
        return self.group_size if self.group_size is not None else (-1 if self.bits == 8 else 128)


class Calibrated(WeightOnly):
    """A quantization that looks at what the layers see."""

    data: str = Field(description="name of the calibration data; its `samples` are the crops, 128 by default")
    length: int = Field(2048, ge=8, description="tokens a calibration crop holds (at most the model's context)")
    experts: Experts = Field("routed", description="what experts of a mixture are measured on: the tokens that were "
                                                   "sent to them, or all")


class Rtn(WeightOnly):
    """Round to nearest: no data, one scale a group (or a row)."""

    method: Literal["rtn"]
    scheme: Scheme | Literal["nf4", "llm_int8"] = Field(  # type: ignore[assignment]
        description="bits of the weights; nf4 and llm_int8 are bitsandbytes' (llm_int8 rounds activations, too)")
    clip: Clip = Field("absmax", description="range of a group: its largest weight, or the range that leaves the least "
                                             "squared error")
    double_quant: bool = Field(False, description="nf4: the scales of the blocks in 8 bits, too")
    threshold: float | None = Field(None, ge=0, description="llm_int8: input features with a value beyond it are "
                                                            "multiplied in 16 bit; 0 for none. Default: 6")

    @property
    def group(self) -> int:
        """The group size with its default filled in."""
        return 64 if self.scheme == "nf4" and self.group_size is None else super().group

    @property
    def outliers(self) -> float:
        """The threshold with its default filled in."""
        return 6.0 if self.threshold is None else self.threshold


class Gptq(Calibrated):
    """Round column by column, the columns to come making up for each error (Frantar et al. 2022)."""

    method: Literal["gptq"]
    factors: Literal["awq"] | None = Field(None, description=_FACTORS)
    damping: float = Field(0.01, gt=0, le=1, description="added to the Hessian's diagonal, as a fraction of its mean; "
                                                         "ten times as much is tried, and told, where it fails")
    order: Literal["groups", "activation", "none"] = Field(
        "groups", description="columns by the size of their input: group by group, all together (with the grids of the "
                              "groups fixed beforehand), or as they stand")
    clip: Clip = Field("mse", description="range of a group: its largest weight, or the range that leaves the least "
                                          "squared error, each counted by what it costs")


class Awq(Calibrated):
    """Scale up the weights of large inputs, folding the factors away, then clip and round (Lin et al. 2023)."""

    method: Literal["awq"]
    grid: int = Field(20, ge=0, le=200, description="exponents tried for the factors, beside none; 0 leaves them out")
    clip: bool = Field(True, description="search the range of every group, too")


class Hqq(WeightOnly):
    """Fit scale and zero point to a small l_0.7 norm of the error (Badri and Shaji 2023); needs no data."""

    method: Literal["hqq"]
    group_size: int | None = Field(None, description="weights that share a scale along the input, at most 128. "
                                                     "Default: 64")
    symmetric: bool = Field(False, description="always false: the zero point is what is fitted")
    iterations: int = Field(20, ge=1, le=1000, description="half-quadratic steps")

    @property
    def group(self) -> int:
        """The group size with its default filled in."""
        return self.group_size if self.group_size is not None else 64


class Autoround(Calibrated):
    """Learn how to round by signed gradient descent on the output of each block (Cheng et al. 2023)."""

    method: Literal["autoround"]
    factors: Literal["awq"] | None = Field(None, description=_FACTORS)
    iterations: int = Field(200, ge=1, le=100_000, description="steps of the descent for each block")
    batch_size: int = Field(8, ge=1, le=4096, description="crops a step looks at")


class Smoothquant(Calibrated):
    """Move part of the inputs' range into the weights, the factors folded away, and round (Xiao et al. 2022)."""

    method: Literal["smoothquant"]
    alpha: float = Field(0.5, ge=0, le=1, description="how much of the inputs' range moves into the weights; 0.5 makes "
                                                      "both alike")
    clip: Clip = Field("absmax", description="range of a group: its largest weight, or the range that leaves the least "
                                             "squared error")


class Auto(Options):
    """Give each layer its own number of bits: measure what fewer cost it, then choose within a budget, exactly."""

    method: Literal["auto"]
    data: str = Field(description="name of the calibration data; its `samples` are the crops, 128 by default")
    length: int = Field(2048, ge=8, description="tokens a calibration crop holds (at most the model's context)")
    bits: float | None = Field(None, gt=0, le=16, description="budget: bits of a quantized weight on average, scales "
                                                              "and zero points counted. This or `bytes`")
    bytes: int | None = Field(None, gt=0, description="budget: bytes of all weights on disk, those in 16 bit counted")
    candidates: list[Integers] = Field(["w2a16", "w3a16", "w4a16", "w8a16"], min_length=1,
                                     description="schemes that a layer can get")
    group_size: int | list[int] | None = Field(None, description="weights that share a scale along the input; of a "
                                               "list each is tried with each scheme. At 8 bits always a whole row. "
                                               "Default: 128")
    symmetric: bool = Field(True, description="false stores a zero point for every scale")
    solver: Literal["gptq", "rtn", "awq"] = Field("gptq", description="how each layer is quantized in the end: by the "
                                                  "method with its default options, rtn with clip: mse")
    sensitivity: Literal["kl", "gradient"] = Field(
        "kl", description="what fewer bits cost a layer: the measured divergence of the next-token distribution, or "
                          "its second-order estimate, which takes one backward pass for all layers")
    judge: str | None = Field(None, description="name of data whose answers alone the cost of fewer bits is counted on "
                                                "(chat rows, or prompt and completion, as the task asks them). "
                                                "Default: every token of `data`")
    crops: int | None = Field(None, ge=1, description="calibration crops that the sensitivity is measured on. "
                                                      "Default: 16 for kl, all for gradient")
    ignore: list[str] = Field(["lm_head"], description="layers left in 16 bit, by the end of their name")
    kv_cache: KvDtype | None = Field(None, description=KV_CACHE)

    @property
    def sizes(self) -> list[int]:
        """The group sizes with their default filled in."""
        given = self.group_size if self.group_size is not None else 128
        return given if isinstance(given, list) else [given]

    def grids(self) -> list[tuple[int, int]]:
        """(bits, group size) of every candidate, the smallest first, each once."""
        found = {(BITS[scheme], size) for scheme in self.candidates
                 for size in ([-1] if BITS[scheme] == 8 else self.sizes)}
        return sorted(found, key=lambda grid: (grid[0], -grid[1] if grid[1] != -1 else -(1 << 31)))


class KvCache(Options):
    """Keep keys and values in 8 or 4 bits, a scale for every token and head; the weights are left as they are."""

    method: Literal["kv_cache"]
    dtype: KvDtype = Field(description="int8, fp8 (E4M3), or int4 (with a minimum beside the scale)")

    @property
    def kv_cache(self) -> KvDtype:
        """As the option of the other methods is called."""
        return self.dtype


Quantize = Annotated[Rtn | Gptq | Awq | Hqq | Autoround | Auto | Smoothquant | KvCache, Field(discriminator="method")]
