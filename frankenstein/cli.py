"""`frankenstein-transformer`: the command line, over the same calls as the pipeline's stages."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from frankenstein import __version__
from frankenstein.errors import FrankensteinError, NotBuiltYetError

COMING = {
    "deploy": "write a deployable folder",
    "infer": "fill masks with a trained encoder",
    "web-server": "edit params.yaml in a form in the browser",
}
PROGRAM = "frankenstein-transformer"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a user's mistake ends in one message on stderr and exit code 2."""
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown and options.run is not _refuse:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        options.run(options)
    except FrankensteinError as error:
        print(f"{PROGRAM} {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM} {options.command}: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Train, quantize and use encoders made of published sequence mixers.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    _add_validate(commands)
    _add_train(commands)
    _add_replay(commands)
    _add_quantize(commands)
    _add_sbert_train(commands)
    _add_sbert_infer(commands)
    for name, text in COMING.items():
        _coming(commands, name, text)
    return parser


def _coming(commands: Any, name: str, text: str) -> None:
    """A command that is listed and refuses, whatever its arguments."""
    _command(commands, name, _refuse, f"coming: {text}").add_argument("rest", nargs="*", help=argparse.SUPPRESS)


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + "."
    )
    command.set_defaults(run=run)
    return command


def _add_params(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--params",
        type=Path,
        metavar="FILE",
        help="configuration (default: ./params.yaml if present, else the shipped defaults)",
    )
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key, e.g. model.hidden_size=64; repeatable",
    )


def _load(options: argparse.Namespace) -> Any:
    """The configuration that --params and --set ask for."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    from frankenstein.params import load_params

    overrides = {}
    for item in options.set:
        key, sign, value = item.partition("=")
        if not sign or not key:
            raise FrankensteinError(f"--set {item!r}: expected KEY=VALUE, e.g. model.hidden_size=64")
        try:
            overrides[key] = YAML(typ="safe").load(value)
        except YAMLError:
            raise FrankensteinError(f"--set {item!r}: the value is not valid YAML") from None
    default = Path("params.yaml")
    path = options.params or (default if default.is_file() else None)
    return load_params(path, overrides)


def _refuse(options: argparse.Namespace) -> None:
    raise NotBuiltYetError(f"not built yet in version {__version__}; `{PROGRAM} --help` lists what is")


def _add_validate(commands: Any) -> None:
    command = _command(commands, "validate", _validate, "check a configuration and the inputs it names")
    command.add_argument(
        "file", type=Path, nargs="?", default=Path("params.yaml"), help="configuration (default: params.yaml)"
    )


def _validate(options: argparse.Namespace) -> None:
    from frankenstein.inputs import check_inputs
    from frankenstein.params import load_params

    check_inputs(load_params(options.file))
    print(f"{options.file}: valid")


def _add_train(commands: Any) -> None:
    command = _command(
        commands,
        "train",
        _train,
        "cache and tokenize the corpus and pretrain an encoder, into one folder; under torchrun by several processes",
    )
    _add_params(command)
    command.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="gets cache, tokenizer, tokens, encoder, metrics and logs",
    )


def _train(options: argparse.Namespace) -> None:
    from dataclasses import replace

    from frankenstein.training.pretrain import pretrain
    from frankenstein.training.processes import processes

    params, out = _load(options), options.out
    with processes() as together:
        together.same(lambda: _prepare_text(params, out))
        pretrain(
            seed=params.seed,
            threads=params.threads,
            model_options=params.model,
            training_options=replace(params.training, csv_log_path=str(out / "logs" / "pretrain.csv")),
            tokens=out / "tokens",
            tokenizer=out / "tokenizer",
            out=out / "encoder",
            resume=out / ".resume",
            metrics=out / "metrics" / "pretrain.json",
            curve=out / "plots" / "pretrain.csv",
        )
        if together.first:
            print(out / "encoder")


def _prepare_text(params: Any, out: Path) -> None:
    """Write cache, tokenizer and tokens."""
    from frankenstein.artifact import open_folder
    from frankenstein.inputs import check_inputs
    from frankenstein.text.cache import cache_parquet
    from frankenstein.text.parquet_folder import cached_texts
    from frankenstein.text.shards import tokenize_corpus
    from frankenstein.text.sources.hub import HubAccess
    from frankenstein.text.tokenizer import Tokenizer

    check_inputs(params)
    training, cache = params.training, out / "cache"
    cache_parquet(
        params.data,
        seed=params.seed,
        max_samples=training.max_samples,
        dataset_batch_size=training.dataset_batch_size,
        stream_local_parquet=training.stream_local_parquet,
        hub=HubAccess(training.cache_dir, training.local_parquet_dir, training.prefer_local_cache),
        out=cache,
    )
    texts = cached_texts(cache, open_folder(cache, "corpus_cache")["shards"])
    words = Tokenizer.train(
        texts, out / "tokenizer", options=params.tokenizer, vocab_size=params.model.vocab_size, seed=params.seed
    )
    tokenize_corpus(
        cache,
        words,
        max_length=training.max_length,
        seed=params.seed,
        out=out / "tokens",
        validation_fraction=params.data.validation_fraction,
        tokens_per_shard=params.tokenizer.tokens_per_shard,
        num_workers=training.num_workers,
    )


def _add_replay(commands: Any) -> None:
    text = (
        "run the step that stopped a training again and name the first module whose values or gradients are not finite"
    )
    command = _command(commands, "replay", _replay, text)
    command.add_argument("folder", type=Path, help="emergency checkpoint, emergency-<step> among the run's checkpoints")
    command.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="MODULE",
        help="import this module first, if the model uses what it registers; repeatable",
    )


def _replay(options: argparse.Namespace) -> None:
    from importlib import import_module

    for name in options.plugin:
        try:
            import_module(name)
        except ImportError as error:
            raise FrankensteinError(f"--plugin {name}: cannot be imported: {error}") from None
    from frankenstein.sentence.objective import RECIPES
    from frankenstein.training.replay import replay, report

    for line in report(replay(options.folder, RECIPES)):
        print(line)


def _add_quantize(commands: Any) -> None:
    command = _command(commands, "quantize", _quantize, "make a pretrained encoder ternary and pack it")
    _add_params(command)
    command.add_argument("--encoder", type=Path, required=True, metavar="DIR", help="the pretrained encoder")
    command.add_argument("--tokens", type=Path, required=True, metavar="DIR", help="packed tokens for the finish")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets latent/, packed/ and metrics")


def _quantize(options: argparse.Namespace) -> None:
    params, out = _load(options), options.out
    from frankenstein.training.ternary import quantize_encoder

    quantize_encoder(
        seed=params.seed,
        threads=params.threads,
        options=params.quantize,
        training_options=params.training,
        encoder=options.encoder,
        tokens=options.tokens,
        out=out,
        resume=out.parent / ".resume",
        metrics=out.parent / "metrics" / "quantize.json",
        curve=out.parent / "plots" / "quantize.csv",
    )
    print(out)


def _add_sbert_train(commands: Any) -> None:
    command = _command(commands, "sbert-train", _sbert_train, "fine-tune one encoder on sentence pairs")
    _add_params(command)
    command.add_argument(
        "--encoder",
        type=Path,
        required=True,
        metavar="DIR",
        help="a full-precision encoder, or the latent weights of a ternary one",
    )
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--cache", type=Path, metavar="DIR", help="cached tasks; sbert.tasks says which")
    source.add_argument(
        "--pairs", type=Path, metavar="FILE", help="parquet, csv or jsonl with sentence1, sentence2 and score"
    )
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="the sentence encoder")


def _sbert_train(options: argparse.Namespace) -> None:
    params = _load(options)
    from frankenstein.sentence.files import file_data
    from frankenstein.sentence.finetune import finetune
    from frankenstein.sentence.pairs import task_data

    data = (
        file_data(options.pairs)
        if options.pairs
        else task_data(options.cache, params.sbert.tasks, params.sbert.dev_pairs)
    )
    finetune(
        encoder=options.encoder,
        data=data,
        options=params.sbert,
        seed=params.seed,
        threads=params.threads,
        out=options.out,
        resume=options.out.parent / ".resume",
    )
    print(options.out)


def _add_sbert_infer(commands: Any) -> None:
    command = _command(commands, "sbert-infer", _refuse, "use a sentence encoder")
    modes = command.add_subparsers(dest="mode", required=True, metavar="mode")
    pair = _command(modes, "similarity", _similarity, "cosine of two sentences")
    pair.add_argument("first")
    pair.add_argument("second")
    file = _command(modes, "encode", _encode, "embed the sentences of a file")
    file.add_argument(
        "--input", type=Path, required=True, metavar="FILE", help="txt (a sentence a line), csv, jsonl or parquet"
    )
    file.add_argument("--out", type=Path, required=True, metavar="DIR", help="embeddings as parquet and npy")
    file.add_argument("--precision", default="float32", choices=["float32", "float16", "int8"], help="number type")
    for mode in (pair, file):
        mode.add_argument(
            "--model", type=Path, required=True, metavar="DIR", help="a sentence encoder, packed or full precision"
        )
        mode.add_argument("--backend", default="auto", help="integer backend of a packed model (default: auto)")
    for name, text in {"search": "the most similar sentences of a corpus", "cluster": "group sentences"}.items():
        _coming(modes, name, text)


def _similarity(options: argparse.Namespace) -> None:
    from frankenstein.sentence.encoder import SentenceEncoder
    from frankenstein.sentence.modes import similarity

    model = SentenceEncoder.load(options.model, backend=options.backend)
    print(f"{similarity(model, [(options.first, options.second)])[0]:.4f}")


def _encode(options: argparse.Namespace) -> None:
    from frankenstein.sentence.encoder import SentenceEncoder
    from frankenstein.sentence.modes import encode_file

    model = SentenceEncoder.load(options.model, backend=options.backend)
    count = encode_file(model, options.input, options.out, options.precision)
    print(f"{options.out}: {count} sentences")


if __name__ == "__main__":
    sys.exit(main())
