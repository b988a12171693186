"""The Llama 2 chat template, for tokenizers that bring none and for the loss on answers only."""

from importlib.resources import files
from typing import Any

from .errors import CommandError, first_line

_PROBES = (
    [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "v"},
        {"role": "assistant", "content": "b"},
    ],
    [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}],
)


def llama2_template() -> str:
    """Llama 2's chat format as a Jinja template. `{% generation %}` marks what the model has to learn to say."""
    return (files("fastlora.cli") / "data" / "llama2_chat.jinja").read_text(encoding="utf-8").rstrip("\n")


def training_template(tokenizer: Any, answers_only: bool) -> str:
    """The template to train with: the tokenizer's own, or Llama 2's where it has none.

    The loss on answers needs a template that marks them. Llama 2's own template does not: when the tokenizer's
    template writes the same text as ours, ours takes its place. Raises `CommandError` when there is none to be had.
    """
    from trl.chat_template_utils import get_training_chat_template

    own = tokenizer.chat_template
    if own is None:
        return llama2_template()
    if not answers_only:
        return own
    if _writes_llama2(tokenizer):
        return llama2_template()
    try:
        return get_training_chat_template(tokenizer) or own
    except ValueError as error:
        raise CommandError(
            f"the tokenizer's chat template does not mark the answers ({first_line(error)}) "
            "Use --full-loss, or add {% generation %} markers to the template"
        ) from None


def _writes_llama2(tokenizer: Any) -> bool:
    try:
        return all(
            tokenizer.apply_chat_template(probe, tokenize=False)
            == tokenizer.apply_chat_template(probe, tokenize=False, chat_template=llama2_template())
            for probe in _PROBES
        )
    except Exception:  # a template may raise whatever it likes on a role it does not know
        return False
