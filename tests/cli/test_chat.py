import pytest

from fastlora.cli.chat import llama2_template, training_template
from fastlora.cli.errors import CommandError

SYSTEM = {"role": "system", "content": "Be brief."}
TURN = [{"role": "user", "content": " Who are you? "}, {"role": "assistant", "content": " A llama. "}]
NEXT = [{"role": "user", "content": "Really?"}, {"role": "assistant", "content": "Yes."}]
# The template that Llama 2 chat models bring: the same text, no marks.
UNMARKED = llama2_template().replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")


@pytest.mark.parametrize(
    "messages, text",
    [
        (TURN, "<s>[INST] Who are you? [/INST] A llama. </s>"),
        ([SYSTEM, *TURN], "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n Who are you? [/INST] A llama. </s>"),
        (TURN + NEXT, "<s>[INST] Who are you? [/INST] A llama. </s><s>[INST] Really? [/INST] Yes. </s>"),
        (
            [SYSTEM, *TURN, *NEXT],
            "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n Who are you? [/INST] A llama. </s>"
            "<s>[INST] Really? [/INST] Yes. </s>",
        ),
        (TURN[:1], "<s>[INST] Who are you? [/INST]"),
    ],
)
def test_the_exact_text(tokenizer, messages, text):
    assert tokenizer.apply_chat_template(messages, chat_template=llama2_template(), tokenize=False) == text


def test_the_marked_tokens_are_the_answers_and_their_end(tokenizer):
    encoded = tokenizer.apply_chat_template(
        TURN + NEXT, chat_template=llama2_template(), return_assistant_tokens_mask=True, return_dict=True
    )
    marked = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(marked) == " A llama. </s> Yes. </s>"


def test_roles_out_of_turn_are_refused(tokenizer):
    with pytest.raises(Exception, match="in turn"):
        tokenizer.apply_chat_template(TURN[:1] * 2, chat_template=llama2_template(), tokenize=False)


def template_for(tokenizer, own, answers_only):
    tokenizer.chat_template = own
    try:
        return training_template(tokenizer, answers_only)
    finally:
        tokenizer.chat_template = None


def test_which_template_trains(tokenizer):
    other = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    assert template_for(tokenizer, None, True) == llama2_template()
    assert template_for(tokenizer, UNMARKED, True) == llama2_template()
    assert template_for(tokenizer, UNMARKED, False) == UNMARKED
    assert template_for(tokenizer, other, False) == other
    with pytest.raises(CommandError, match="--full-loss"):
        template_for(tokenizer, other, True)
