"""The hybrid layer: a mixer and a feed-forward, each with a norm before and a residual around it."""

from torch import Tensor, nn

from frankenstein.mixers.base import Mixer
from frankenstein.model.feed_forward import FeedForward
from frankenstein.model.moe import MixtureOfExperts


class Block(nn.Module):
    """z = x + mixer(norm(x)); y = z + ffn(norm(z)), with dropout on both sublayers' outputs.

    Source: seed 002 eq. 20-21; the pre-norm order of Xiong et al. 2020, https://arxiv.org/abs/2002.04745.
    """

    def __init__(
        self,
        mixer_norm: nn.Module,
        mixer: Mixer,
        ffn_norm: nn.Module,
        ffn: FeedForward | MixtureOfExperts,
        dropout: float,
    ) -> None:
        super().__init__()
        self.mixer_norm, self.mixer = mixer_norm, mixer
        self.ffn_norm, self.ffn = ffn_norm, ffn
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, logical_index: int = 0, at: Tensor | None = None
    ) -> Tensor:
        """(B, T, D) to (B, T, D), or (N, D) at chosen positions.

        Args:
            mask: (B, T) bool, True for real tokens, which come first; None means all are real.
            logical_index: the place of this traversal among all layers x loops.
            at: (N,) positions in the flattened (B, T); a dense feed-forward sees these tokens only.
        """
        self.mixer.logical_index = logical_index
        x = x + self.dropout(self.mixer(self.mixer_norm(x), mask))
        if at is None:
            return x + self.dropout(self.ffn(self.ffn_norm(x), mask))
        if isinstance(self.ffn, MixtureOfExperts):  # balance and capacity count all tokens
            return (x + self.dropout(self.ffn(self.ffn_norm(x), mask))).flatten(0, 1).index_select(0, at)
        x = x.flatten(0, 1).index_select(0, at)
        return x + self.dropout(self.ffn(self.ffn_norm(x)))

    def losses(self) -> dict[str, Tensor]:
        """Auxiliary losses of the last traversal, by name."""
        losses = dict(self.mixer.losses())
        if isinstance(self.ffn, MixtureOfExperts) and self.ffn.routing is not None:
            losses["balance"] = self.ffn.routing.balance
        return losses
