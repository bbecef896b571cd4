"""How a row of instruction data becomes a prompt and an answer in tokens: by the tokenizer's chat template.

A row is {"input", "output"}, both text, or {"messages": [{"role", "content"}, ...]}; either may have a "system" text.
The chat template writes the whole conversation, as it does for serving; the loss is on the tokens that the model
would have to generate: the assistant's words and the token that ends them.

Ours, because NeMo's chat dataset puts the loss on every token, without a word, unless the template marks the
assistant's part by {% generation %}, which few do; and its prompt templates know one end token and one turn.
"""

import json
import os
import re
import sys
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from nemo_tutorial import checkpoints, models

KEYS = ("input", "output")
ROLES = ("system", "user", "assistant")
# For a tokenizer without a chat template.
PLAIN = "### Instruction:\n{input}\n\n### Response:\n{output}"


def messages(row, system_prompt=None):
    """A row as chat messages; a system message comes first, the row's own before `system_prompt`."""
    if row.get("messages") is not None:
        found = [{"role": message["role"], "content": message["content"]} for message in row["messages"]]
    else:
        found = [{"role": "user", "content": row["input"]}, {"role": "assistant", "content": row["output"]}]
    system = row.get("system") or system_prompt
    if system and found[0]["role"] != "system":
        found.insert(0, {"role": "system", "content": system})
    return found


def row_problem(row):
    """What is wrong with a row, to follow "FILE:LINE ", or None."""
    if not isinstance(row, dict):
        return "is not a JSON object"
    if not isinstance(row.get("system") or "", str):
        return "has a system that is no text"
    if row.get("messages") is None:
        bad = [key for key in KEYS if not isinstance(row.get(key), str)]
        if bad:
            return f"has no text under {', '.join(bad)}; every row needs {', '.join(KEYS)}, or messages"
        return None
    found = row["messages"]
    if not isinstance(found, list) or not all(isinstance(message, dict) for message in found):
        return 'has messages that are not a list of {"role", "content"}'
    for number, message in enumerate(found, 1):
        if message.get("role") not in ROLES:
            return f"has a message {number} of role {message.get('role')!r}; the roles are {', '.join(ROLES)}"
        if not isinstance(message.get("content"), str):
            return f"has a message {number} without text under content"
        if message["role"] == "system" and (number > 1 or row.get("system")):
            return "has a second system text; there can be one, first"
    roles = [message["role"] for message in found]
    if "user" not in roles or roles[-1] != "assistant":
        return "has messages that do not end with an answer: a user's, then an assistant's as the last"
    return None


def template_problems(template, system_prompt):
    """What is wrong with --prompt_template and --system_prompt."""
    if template is None:
        return []
    problems = []
    if not template.endswith("{output}"):
        problems.append("--prompt_template must end with {output}: the end token is added after it")
    named = re.findall(r"{(.*?)}", template)
    other = sorted(set(named) - {*KEYS, "system"})
    if other or named.count("input") != 1 or named.count("output") != 1 or named.count("system") > 1:
        problems.append(
            "--prompt_template needs {input} and {output} once each, may have {system} once, and no other braces"
            + (f", not {{{other[0]}}}" if other else "")
        )
    elif system_prompt and "system" not in named:
        problems.append("--system_prompt has no effect: --prompt_template has no {system} to write it at")
    return problems


def unescaped(text):
    """Text from the command line: \\n and \\t written out are a line end and a tab. None stays None."""
    return text and text.replace("\\n", "\n").replace("\\t", "\t")


def chat_template(prompt_template, bos_token=""):
    """A prompt template as a chat template (Jinja), so that training, `generate.py` and serving read the same one.

    Every exchange of a conversation is written by it, each answer ended by the end token.
    """
    before = prompt_template[: -len("{output}")]
    names = {"{input}": "message['content']", "{system}": "system.text"}
    # repr: Jinja reads its strings as Python does.
    asked = " ~ ".join(names.get(part) or repr(part) for part in re.split(r"({\w+})", before) if part)
    bos = "{{ bos_token }}" if bos_token and not before.startswith(bos_token) else ""
    system, missing = "{{ raise_exception('it has no {system} for the system message') }}", ""
    if "{system}" in before:
        system = "{% set system.text = message['content'] %}"
        missing = "{% if not system.text %}{{ raise_exception('there is no text for its {system}') }}{% endif %}"
    return (
        f"{bos}{{% set system = namespace(text='') %}}{{% for message in messages %}}"
        f"{{% if message['role'] == 'system' %}}{system}"
        f"{{% elif message['role'] == 'user' %}}{missing}{{{{ {asked} }}}}"
        "{% else %}{{ message['content'] ~ eos_token }}{% endif %}{% endfor %}"
    )


class Sample(NamedTuple):
    """A conversation in tokens, and which of them the loss is on."""

    ids: list  # [tokens]
    loss: list  # [tokens], 0 or 1
    unasked: int  # assistant's turns without loss: the whole conversation writes what is before them otherwise
    merged: int  # assistant's turns whose first token begins within the prompt


class Chat:
    """A tokenizer with its chat template, or with `prompt_template` in its place.

    Raises ValueError if answers can't be told from prompts, or have no end token.
    """

    def __init__(self, folder, prompt_template=None, day=None):
        from transformers import AutoTokenizer

        code = bool(models.tokenizer_code(folder))
        self.tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=code)
        # Some templates write today's date: it is that of the preparation, for every row and after every resume.
        self.day = day or datetime.now()
        self.own_template = None  # what replaces the tokenizer's
        if prompt_template or not self.tokenizer.chat_template:
            plain = self.tokenizer("x")["input_ids"]
            bos = self.tokenizer.bos_token if plain and plain[0] == self.tokenizer.bos_token_id else ""
            self.own_template = chat_template(prompt_template or PLAIN, bos)
            self.tokenizer.chat_template = self.own_template
        system = [{"role": "system", "content": "zero"}] if "{system}" in (prompt_template or "") else []
        self.end, self.ends_every_turn = self._find_end(system)
        special = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        self.special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")

    def text(self, conversation, ask=False):
        """What the chat template writes; with `ask`, up to where the assistant's next words begin."""
        from jinja2.exceptions import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=ask, strftime_now=self.day.strftime
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses it: {error}") from None

    def _ids(self, texts):
        # As apply_chat_template does.
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    def _find_end(self, start):
        """(id of the token that the template writes after an answer, whether after every one of a conversation)."""
        start = [*start, {"role": "user", "content": "one"}]
        answer = {"role": "assistant", "content": "two"}
        ask, whole = self.text(start, ask=True), self.text([*start, answer])
        if not whole.startswith(ask) or "two" not in whole[len(ask) :]:
            raise ValueError(
                f"the tokenizer's chat template asks with {ask!r}, but writes {whole!r} when answered: what is trained "
                "would not be what is served; give a --prompt_template"
            )
        end, added = None, {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}
        for token in self._ids([whole[whole.rindex("two") + len("two") :] or " "])[0]:
            if token in added:
                end = token
                break
            if self.tokenizer.decode([token]).strip():
                break
        if end is None:
            raise ValueError(
                "the tokenizer's chat template ends an answer with no end token, so the model would never stop; "
                "give a --prompt_template"
            )
        try:
            whole = self.text([*start, answer, {"role": "user", "content": "three"}, answer])
        except ValueError:
            return end, False
        return end, self.tokenizer.convert_ids_to_tokens(end) in whole[whole.index("two") : whole.index("three")]

    def samples(self, conversations):
        """Each conversation as a Sample. Raises RowError for the first that can't be one."""
        texts, places = [], []
        for number, conversation in enumerate(conversations):
            try:
                whole = self.text(conversation)
                turns = [i for i, message in enumerate(conversation) if message["role"] == "assistant"]
                asks = [self.text(conversation[:turn], ask=True) for turn in turns]
                self._check(conversation, whole, asks)
            except ValueError as error:
                raise RowError(number, str(error)) from None
            asks = [ask if whole.startswith(ask) else None for ask in asks]
            places.append((len(texts), len(texts) + 1 + sum(ask is not None for ask in asks), asks.count(None)))
            texts += [whole, *(ask for ask in asks if ask is not None)]
        ids, found = self._ids(texts), []
        for number, (first, stop, unasked) in enumerate(places):
            try:
                found.append(self._sample(ids[first], ids[first + 1 : stop], unasked))
            except ValueError as error:
                raise RowError(number, str(error)) from None
        return found

    def _check(self, conversation, whole, asks):
        """Raise ValueError if the template left something out, or could not have asked for the last answer so."""
        for message in conversation:
            if message["role"] != "assistant" and message["content"].strip() not in whole:
                raise ValueError(f"the chat template leaves out the {message['role']} message")
        if not whole.startswith(asks[-1]):
            raise ValueError("the chat template writes the conversation otherwise than it asks for the answer")
        if len(asks) > 1 and not self.ends_every_turn:
            raise ValueError("the chat template ends only the last answer of a conversation, and it has more")

    def _sample(self, whole, asks, unasked):
        loss, merged = [0] * len(whole), 0
        starts = []
        for ask in asks:
            # Where both begin alike is what serving would give the model; there the model's own words begin.
            start = next((i for i, (a, b) in enumerate(zip(ask, whole)) if a != b), min(len(ask), len(whole)))
            merged += start < len(ask)
            starts.append(start)
        for start, limit in zip(starts, [*starts[1:], len(whole)]):
            try:
                stop = whole.index(self.end, start, limit) + 1
            except ValueError:
                raise ValueError("an answer has no end token") from None
            loss[start:stop] = [1] * (stop - start)
        return Sample(whole, loss, unasked, merged)


class RowError(ValueError):
    """What is wrong with one of the conversations: its number, and the words."""

    def __init__(self, number, message):
        super().__init__(message)
        self.number = number


def end_problem(chat, folder):
    """A warning, or None: the model's own settings don't name the end token that it is taught."""
    ends = {chat.tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        try:
            found = json.loads((Path(folder) / name).read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError):
            continue
        ends |= set(found if isinstance(found, list) else [found])
    if chat.end in ends:
        return None
    token = chat.tokenizer.convert_ids_to_tokens(chat.end)
    return (
        f"answers end with {token}, which is not an end token of the model (eos_token_id in generation_config.json): "
        "serve it with that as a stop token"
    )


def write_tokenizer(source, target, template):
    """Copy a tokenizer's folder with `template` as its chat template."""
    target = Path(target)
    checkpoints.copy_assets(source, target)
    for name in ("chat_template.jinja", "chat_template.json"):
        (target / name).unlink(missing_ok=True)  # they would win over the config
    file = target / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    config["chat_template"] = template
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return target


def show(title, tokenizer, ids, loss):
    """Print a sample as text, the part with loss in green, or between ⟦ and ⟧ where there are no colours."""
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    begin, end = ("\x1b[32m", "\x1b[0m") if colours else ("⟦", "⟧")
    parts, first = [], 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or loss[i] != loss[first]:
            text = tokenizer.decode(ids[first:i], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            parts.append(begin + text + end if loss[first] else text)
            first = i
    where = "in green" if colours else "between ⟦ and ⟧"
    print(f"\n{title}: {len(ids)} tokens, {sum(map(int, loss))} with loss ({where})")
    print("".join(parts), flush=True)
