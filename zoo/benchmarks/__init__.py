"""Problems with known answers."""

from zoo.benchmarks.categorical_channel import (
    ChannelTerms,
    channel_terms,
    divergence,
    generated,
    mutual_information_of,
    optimal_decoder,
    optimal_marginal,
)
from zoo.benchmarks.decoder_optimum import OptimalDecoder
from zoo.benchmarks.ladder import KnownAnswer, known_answers
from zoo.benchmarks.toy_channel import (
    ToyChannel,
    beta_loss,
    class_information,
    target_rate_loss,
    toy_data,
    train_channel,
)

__all__ = [
    "ChannelTerms",
    "KnownAnswer",
    "OptimalDecoder",
    "ToyChannel",
    "beta_loss",
    "channel_terms",
    "class_information",
    "divergence",
    "generated",
    "known_answers",
    "mutual_information_of",
    "optimal_decoder",
    "optimal_marginal",
    "target_rate_loss",
    "toy_data",
    "train_channel",
]
