"""How far a merged model is from base + adapter: numbers, their limits, and words for them."""

from collections.abc import Iterator
from dataclasses import dataclass

from llmtune.adapters.bypassed import describe_bypassed
from llmtune.checks.modules import ModuleDifference
from llmtune.io.manifest import CheckRecord

MAX_KL_SHARE = 1e-5
"""Of KL(adapter || base), what a right merge stored and computed in float32 may differ by."""
FLOAT32_KL = 1e-6
"""Nats per token that the arithmetic of float32 alone comes to, and more."""
NOTABLE_SHARE = 0.1
"""Of KL(adapter || base), from which on what rounding costs is said."""


@dataclass(frozen=True)
class GreedyDivergence:
    """Where the greedy answers to one open prompt part, and how sure either model was there."""

    prompt: int  # place in `open_prompts`
    position: int  # tokens that both answers begin with
    live_token: int | None  # None: the answer ended
    merged_token: int | None
    live_margin: float  # the likeliest token's logit less the second's
    merged_margin: float
    live_text: str
    merged_text: str


@dataclass(frozen=True)
class LabelDifference:
    """A labelled prompt on which the models choose differently, and how sure either was."""

    prompt: int  # place in `labels`
    live_choice: int
    merged_choice: int
    live_margin: float  # log-likelihood of the choice less the next best's, nats
    merged_margin: float


@dataclass(frozen=True)
class VerifyResult:
    """How far the merged model's answers are from the adapter model's."""

    dtype: str
    num_tokens: int
    max_logit_difference: float
    kl: float  # KL(adapter || merged), nats per token
    top1_agreement: float
    live_perplexity: float  # of the tokens of `sequences`, each given those before it
    merged_perplexity: float
    num_labels: int
    num_same_labels: int
    label_differences: tuple[LabelDifference, ...]
    num_open_prompts: int
    num_same_texts: int
    divergences: tuple[GreedyDivergence, ...]
    wrong_modules: tuple[ModuleDifference, ...] = ()
    """Modules whose merged weight does not compute what the live one does."""
    bypassed_modules: tuple[str, ...] = ()
    """Adapted modules whose weight the live model reads itself, past their adapter."""
    base_kl: float | None = None
    """KL(adapter || base), nats per token: what the adapter does; None without an adapter."""
    stored_dtype: str | None = None
    """The coarsest type of the merged weights on the disk; None if they are quantized."""
    live_kl: float | None = None
    """KL(quantized model and adapter || merged), if its layers also round what goes in; `kl` is
    then that of the same weights computed exactly."""

    @property
    def kl_share(self) -> float | None:
        """The KL as a share of what the adapter does to the answers."""
        return self.kl / self.base_kl if self.base_kl else None

    def find_problem(self, max_kl: float) -> str | None:
        """Say why this is not a right merge of its adapter; None if it is one.

        Args:
            max_kl: nats per token, of `merge.max_kl`.
        """
        if self.bypassed_modules:
            return (
                f"{describe_bypassed(self.bypassed_modules)}: train again without it among the "
                "adapter's target_modules"
            )
        if not self.kl <= max_kl:
            return (
                f"merged model and live adapter differ by {self.kl:.4f} nats/token (KL), more "
                f"than merge.max_kl={max_kl:g} (--max-kl)"
            )
        if self.wrong_modules:
            shown = "; ".join(one.describe() for one in self.wrong_modules[:3])
            return (
                f"{len(self.wrong_modules)} merged modules do not compute what the live adapter "
                f"does: {shown}"
            )
        is_exact = self.dtype == self.stored_dtype == "float32"
        if is_exact and self.base_kl is not None:
            allowed = max(FLOAT32_KL, MAX_KL_SHARE * self.base_kl)
            if not self.kl <= allowed:
                return (
                    f"merged model and live adapter differ by {self.kl:.2e} nats/token (KL) in "
                    f"float32, {self.kl_share or 0:.1%} of what the adapter does "
                    f"({self.base_kl:.2e}); rounding is less than {allowed:.1e}"
                )
        return None

    def notices(self) -> Iterator[str]:
        """Yield what the user should know of a right merge."""
        share = self.kl_share
        if (
            share is not None
            and share > NOTABLE_SHARE
            and self.stored_dtype not in (None, "float32")
        ):
            yield (
                f"rounding to {self.stored_dtype} changes the answers by {share:.0%} of what the "
                f"adapter does (KL {self.kl:.2e} of {self.base_kl:.2e} nats/token); --dtype "
                "float32 keeps all of it"
            )
        if self.live_kl is not None:
            yield (
                f"the quantized model also rounds what goes into its layers: with its adapter it "
                f"is {self.live_kl:.2e} nats/token (KL) from the merged model, which is judged by "
                "the same weights computed exactly"
            )

    def numbers(self) -> CheckRecord:
        """Return the numbers as JSON, without the texts."""
        return {
            "kl": self.kl,
            "top1_agreement": self.top1_agreement,
            "perplexity": self.merged_perplexity,
            "live_perplexity": self.live_perplexity,
            "max_logit_difference": self.max_logit_difference,
            "num_tokens": self.num_tokens,
            "num_labels": self.num_labels,
            "num_same_labels": self.num_same_labels,
            "dtype": self.dtype,
            "base_kl": self.base_kl,
            "live_kl": self.live_kl,
        }

    def summary(self) -> str:
        """Say in one line how close merged model and adapter are."""
        return (
            f"merged against adapter in {self.dtype}: KL {self.kl:.2e} nats/token{self._share()}, "
            f"largest logit difference {self.max_logit_difference:.3f}, top-1 agreement "
            f"{self.top1_agreement:.2%}, {self.num_same_labels} of {self.num_labels} labels and "
            f"{self.num_same_texts} of {self.num_open_prompts} greedy texts the same"
        )

    def _share(self) -> str:
        return f" ({self.kl_share:.1g} of the adapter's effect)" if self.kl_share else ""
