"""Rows in tokens: those of the chat template to the last one, the loss on the answers and their end tokens alone."""

import json
from datetime import datetime

import pytest

from nemo_tutorial import prompts

# The shapes of five families' chat templates, written for these tests.
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (  # Qwen: a system message of its own if there is none
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (  # no generation prompt; the answer begins with a space; the system text is before the last question
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}[INST] {% if system is defined and messages[loop.index0:] "
    "| selectattr('role', 'equalto', 'user') | list | length == 1 %}{{ system + '\n\n' }}{% endif %}"
    "{{ m['content'] }} [/INST]{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}<start_of_turn>"
    "{{ ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI_3 = (  # ends the last answer twice
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# family: (template, special tokens, begin, end of text, token that ends an answer, knows a system message)
FAMILIES = {
    "llama3": (
        LLAMA_3,
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|eot_id|>",
        True,
    ),
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"], None, "<|im_end|>", "<|im_end|>", True),
    "mistral": (MISTRAL, ["<s>", "</s>"], "<s>", "</s>", "</s>", True),
    "gemma": (
        GEMMA,
        ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
        "<bos>",
        "<eos>",
        "<end_of_turn>",
        False,
    ),
    "phi3": (
        PHI_3,
        ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        None,
        "<|endoftext|>",
        "<|end|>",
        True,
    ),
}
TEXTS = [
    "台灣最高的山是哪一座？",
    "玉山。",
    "What is the capital of Taiwan?",
    "It is Taipei.",
    " [INST]:\n\n\n",
    "a b c",
]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory, load_script):
    """Make a tokenizer's folder: a byte-level BPE on TEXTS with a family's special tokens and template."""
    words = load_script("data/make_tiny_model.py").WORDS

    def make(template, special, bos, eos):
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
        from transformers import PreTrainedTokenizerFast

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(words), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(TEXTS * 3, trainer)
        tokenizer.add_special_tokens(special)
        if bos:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
            )
        folder = tmp_path_factory.mktemp("tokenizer")
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
        fast.chat_template = template
        fast.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def family(tokenizer_folder):
    """A family's Chat, and the token that ends its answers."""
    made = {}

    def get(name):
        if name not in made:
            template, special, bos, eos, end, _ = FAMILIES[name]
            made[name] = prompts.Chat(tokenizer_folder(template, special, bos, eos)), end
        return made[name]

    return get


def with_loss(chat, sample):
    """The parts of a sample that have loss, as texts."""
    parts, before = [], 0
    for token, loss in zip(sample.ids, sample.loss):
        if loss and not before:
            parts.append([])
        if loss:
            parts[-1].append(token)
        before = loss
    return [chat.tokenizer.decode(part) for part in parts]


def turns(*texts, system=None):
    roles = ["user", "assistant"] * len(texts)
    found = [{"role": role, "content": text} for role, text in zip(roles, texts)]
    return [{"role": "system", "content": system}, *found] if system else found


CONVERSATIONS = [turns("台灣最高的山是哪一座？", "玉山。"), turns("Hi", "Hello!", "好嗎？", "好。", "a", "b")]


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_those_of_serving_and_loss_is_on_the_answers(family, name):
    chat, end = family(name)
    conversations = list(CONVERSATIONS)
    if FAMILIES[name][5]:
        conversations.append(turns("What is it?", "It is Taipei.", system="請用中文回答。"))
    begin = " " if name == "mistral" else ""
    for conversation, sample in zip(conversations, chat.samples(conversations)):
        assert sample.ids == chat.tokenizer.apply_chat_template(conversation)
        answers = [message["content"] for message in conversation if message["role"] == "assistant"]
        assert with_loss(chat, sample) == [begin + answer + end for answer in answers]
        assert (sample.unasked, sample.merged) == (0, 0)
        # What a served model is given before each answer is what training shows before it.
        for turn, message in enumerate(conversation):
            if message["role"] == "assistant":
                asked = chat.tokenizer.apply_chat_template(conversation[:turn], add_generation_prompt=True)
                assert sample.ids[: len(asked)] == asked and sample.loss[len(asked)] and not sample.loss[len(asked) - 1]


def test_empty_answer_is_an_end_token(family):
    chat, end = family("llama3")
    assert with_loss(chat, chat.samples([turns("?", "")])[0]) == [end]


def refused(chat, conversation, message):
    with pytest.raises(prompts.RowError, match=message) as error:
        chat.samples([CONVERSATIONS[0], conversation])
    assert error.value.number == 1


def test_no_system_role(family):
    refused(family("gemma")[0], turns("?", "!", system="簡短。"), "System role not supported")


def test_a_system_message_that_the_template_drops(tokenizer_folder):
    template = PHI_3.replace("{{ '<|'", "{% if m['role'] != 'system' %}{{ '<|'").replace(
        "'<|end|>\n' }}", "'<|end|>\n' }}{% endif %}"
    )
    chat = prompts.Chat(tokenizer_folder(template, *FAMILIES["phi3"][1:4]))
    refused(chat, turns("?", "!", system="簡短。"), "leaves out the system message")


def test_turns_that_were_asked_otherwise_have_no_loss(family):
    """Mistral's newer templates: the system text moves on to the last question, so the first was not asked so."""
    chat, end = family("mistral")
    conversation = turns("one", "two", "three", "four", system="簡短。")
    (sample,) = chat.samples([conversation])
    assert sample.ids == chat.tokenizer.apply_chat_template(conversation)
    assert with_loss(chat, sample) == [" four" + end] and sample.unasked == 1


def test_a_template_that_asks_otherwise_than_it_writes(tokenizer_folder):
    template = CHATML.replace("assistant\n'", "assistant\n<think>\n'")
    with pytest.raises(ValueError, match="what is trained would not be what is served; give a --prompt_template"):
        prompts.Chat(tokenizer_folder(template, *FAMILIES["chatml"][1:4]))


def test_a_template_without_an_end_token(tokenizer_folder):
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    folder = tokenizer_folder(template, ["</s>"], None, "</s>")
    with pytest.raises(ValueError, match="with no end token, so the model would never stop"):
        prompts.Chat(folder)
    chat = prompts.Chat(folder, "{input}\n{output}")
    assert chat.tokenizer.convert_ids_to_tokens(chat.end) == "</s>", "a --prompt_template helps"


def test_a_template_that_ends_only_the_last_answer(tokenizer_folder):
    template = (
        "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}{{ eos_token if not add_generation_prompt }}"
    )
    chat = prompts.Chat(tokenizer_folder(template, ["</s>"], None, "</s>"))
    assert chat.samples([turns("a", "b")])
    refused(chat, turns("a", "b", "c", "d"), "ends only the last answer")


def test_a_date_stays_that_of_the_preparation(tokenizer_folder):
    folder = tokenizer_folder("{{ strftime_now('%d %b %Y') }}" + CHATML, *FAMILIES["chatml"][1:4])
    chat = prompts.Chat(folder, day=datetime(2024, 2, 29))
    assert chat.tokenizer.decode(chat.samples(CONVERSATIONS)[0].ids).startswith("29 Feb 2024<|im_start|>")


def test_without_a_chat_template_rows_are_plain(tokenizer_folder):
    chat = prompts.Chat(tokenizer_folder(None, *FAMILIES["llama3"][1:4]))
    (sample,) = chat.samples([CONVERSATIONS[0]])
    text = "<|begin_of_text|>### Instruction:\n台灣最高的山是哪一座？\n\n### Response:\n玉山。<|eot_id|>"
    assert chat.tokenizer.decode(sample.ids) == text
    assert with_loss(chat, sample) == ["玉山。<|eot_id|>"]


PROMPT_TEMPLATES = [
    "問：{input}\n答：{output}",
    "系統「{system}」\n\t使用者 😀 \"{input}\" 'x' \\n 100%} {{output}"[:-9] + "{output}",
    "<|begin_of_text|>{input}{output}",
]


@pytest.mark.parametrize("template", PROMPT_TEMPLATES)
def test_prompt_template_as_it_is_written(tokenizer_folder, tmp_path, template):
    """Any text in any language; begun by the tokenizer's first token, once; and kept in the tokenizer for serving."""
    from transformers import AutoTokenizer

    folder = tokenizer_folder(LLAMA_3, *FAMILIES["llama3"][1:4])
    chat = prompts.Chat(folder, template)
    system = "請用中文。" if "{system}" in template else None
    conversation = turns("台灣？", "好。", system=system)
    (sample,) = chat.samples([conversation])
    text = template.replace("{system}", system or "").replace("{input}", "台灣？").replace("{output}", "好。")
    text = "<|begin_of_text|>" + text.removeprefix("<|begin_of_text|>") + "<|eot_id|>"
    assert chat.tokenizer.decode(sample.ids, skip_special_tokens=False) == text
    assert with_loss(chat, sample) == ["好。<|eot_id|>"]
    prompts.write_tokenizer(folder, tmp_path / "kept", chat.own_template)
    kept = AutoTokenizer.from_pretrained(tmp_path / "kept")
    assert kept.apply_chat_template(conversation) == sample.ids


def test_prompt_template_and_system_message(tokenizer_folder):
    folder = tokenizer_folder(LLAMA_3, *FAMILIES["llama3"][1:4])
    refused(prompts.Chat(folder, "{input} {output}"), turns("?", "!", system="s"), "no {system} for the system message")
    with pytest.raises(prompts.RowError, match="there is no text for its {system}"):
        prompts.Chat(folder, "{system} {input} {output}").samples([turns("?", "!")])


def test_a_prompt_that_runs_into_the_answer_is_counted(tokenizer_folder):
    """A prompt that ends in a space, and 'is': the tokenizer joins them, but a served prompt has the space alone."""
    chat = prompts.Chat(tokenizer_folder(LLAMA_3, *FAMILIES["llama3"][1:4]), "What {input}: {output}")
    joined, apart = chat.samples([turns("?", "is Taipei."), turns("?", "玉山。")])
    assert (joined.merged, apart.merged) == (1, 0)
    assert with_loss(chat, joined) == [" is Taipei.<|eot_id|>"]


def test_an_end_token_that_the_model_does_not_know(family, tmp_path):
    chat, _ = family("gemma")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1]}))
    assert "answers end with <end_of_turn>, which is not an end token of the model" in prompts.end_problem(
        chat, tmp_path
    )
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, chat.end]}))
    assert prompts.end_problem(chat, tmp_path) is None
    assert prompts.end_problem(family("llama3")[0], tmp_path / "none") is None


@pytest.mark.parametrize(
    "row, said",
    [
        ({"input": "a", "output": "b"}, None),
        ({"input": "a", "output": "b", "system": None}, None),
        ({"messages": turns("a", "b", "c", "d", system="s")}, None),
        ({"messages": turns("a", "b"), "system": "s"}, None),
        ({"input": "a", "output": 1}, "has no text under output"),
        ({"input": "a", "output": "b", "system": 1}, "has a system that is no text"),
        ({"messages": "a"}, "has messages that are not a list"),
        ({"messages": []}, "has messages that do not end with an answer"),
        ({"messages": turns("a", "b", "c")}, "has messages that do not end with an answer"),
        ({"messages": [{"role": "assistant", "content": "b"}]}, "has messages that do not end with an answer"),
        ({"messages": [{"role": "tool", "content": "b"}]}, "has a message 1 of role 'tool'"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "has a message 1 without text"),
        ({"messages": turns("a", "b", system="s"), "system": "t"}, "has a second system text"),
    ],
)
def test_rows(row, said):
    found = prompts.row_problem(row)
    assert found is None if said is None else said in found


def test_whose_system_message():
    assert prompts.messages({"input": "a", "output": "b"}, "S") == turns("a", "b", system="S")
    assert prompts.messages({"input": "a", "output": "b", "system": "own"}, "S") == turns("a", "b", system="own")
    own = turns("a", "b", system="own")
    assert prompts.messages({"messages": own}, "S") == own
    assert prompts.messages({"messages": turns("a", "b")}) == turns("a", "b")


def test_show(family, capsys, monkeypatch):
    chat, _ = family("chatml")
    (sample,) = chat.samples([turns("嗎", "好")])
    prompts.show("row", chat.tokenizer, sample.ids, sample.loss)
    said = capsys.readouterr().out
    assert "<|im_start|>assistant\n⟦好<|im_end|>⟧\n" in said and "\x1b" not in said
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    prompts.show("row", chat.tokenizer, sample.ids, sample.loss)
    said = capsys.readouterr().out
    assert "<|im_start|>assistant\n\x1b[32m好<|im_end|>\x1b[0m\n" in said and "⟦" not in said
