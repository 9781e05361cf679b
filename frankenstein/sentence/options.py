"""Options of sentence fine-tuning and of the embedding export."""

from dataclasses import dataclass

from frankenstein.options import option


@dataclass(frozen=True)
class SbertOptions:
    """Siamese fine-tuning on sentence pairs."""

    tasks: tuple[str, ...] = option(
        ("xnli", "pawsx", "stsb"),
        "Tasks whose training pairs are used; a task without a training split is an error.",
        minItems=1,
        uniqueItems=True,
    )
    pooling: str = option(
        "max",
        "How token vectors become a sentence vector; max tells who did what to whom sooner than mean does.",
        enum=["mean", "cls", "max"],
    )
    loss: str = option(
        "cosine",
        "cosine: squared error of the cosine against a target in [-1, 1].",
        enum=["cosine", "cosent", "mnrl", "softmax", "matryoshka", "distillation"],
        not_built={"enum": ["cosent", "mnrl", "softmax", "matryoshka", "distillation"]},
    )
    normalize: bool = option(True, "Scale sentence vectors to unit length.")
    epochs: int = option(1, "Passes over the training pairs.", minimum=1)
    batch_size: int = option(32, "Pairs in one step.", minimum=1)
    max_length: int = option(64, "Longer sentences (in tokens) are cut.", minimum=4)
    lr: float = option(6e-4, "Peak learning rate (AdamW, warm-up then cosine to zero).", exclusiveMinimum=0.0)
    weight_decay: float = option(0.01, "Decoupled weight decay.", minimum=0.0)
    warmup_ratio: float = option(0.1, "Share of the steps with a rising learning rate.", minimum=0.0, maximum=1.0)
    dev_pairs: int = option(300, "Most development pairs of a task in the score that ends an epoch.", minimum=2)
    checkpoint_every_n_steps: int = option(200, "Steps between resume checkpoints.", minimum=1)


@dataclass(frozen=True)
class ExportOptions:
    """Embeddings of the cached corpus as files."""

    model: str = option("ternary", "Which fine-tuned model embeds.", enum=["ternary", "full"])
    rows: int = option(2000, "First rows of the cached corpus that are embedded.", minimum=1)
    batch_size: int = option(64, "Sentences in one batch.", minimum=1)
    precision: str = option("float32", "Number type of the exported vectors.", enum=["float32", "float16", "int8"])
