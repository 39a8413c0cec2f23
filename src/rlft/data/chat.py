"""Conversations as text: the tokenizer's chat template, and which parts of its output the assistant wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from rlft.data.parsing import BadRow, Message

__all__ = ["Chat"]

# Arguments of apply_chat_template itself: a row may set what the template sees, not how it is used.
_RESERVED = frozenset(
    "conversation chat_template tools tokenize padding truncation max_length return_tensors return_dict "
    "return_assistant_tokens_mask tokenizer_kwargs add_generation_prompt continue_final_message "
    "sanitize_control_tokens".split()
)
TEMPLATE_REFUSED = "the chat template refused the conversation"

# One end of a stretch of text, and whether the assistant wrote the stretch.
Cut = tuple[int, bool]


class Chat:
    """Renders conversations with a tokenizer's own template, in the sandbox that transformers keeps for it.

    Args:
        tokenizer: a transformers tokenizer.
        end_tokens: the texts of the tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, end_tokens: tuple[str, ...] = ()) -> None:
        self.tokenizer = tokenizer
        self.end_tokens = end_tokens

    def prompt(
        self, messages: list[Message], tools: list[Any] | None, kwargs: Mapping[str, Any], *, alone: bool
    ) -> str:
        """The text generation starts from: the messages, and the header of the assistant's turn.

        Args:
            messages: the turns before the answer.
            tools, kwargs: what the template receives beside the messages.
            alone: no answer follows in the data; a last assistant message is then the beginning of the answer.
        """
        if alone and messages[-1]["role"] == "assistant":
            return self._render(messages, tools, kwargs, continue_final_message=True)
        return self._render(messages, tools, kwargs, add_generation_prompt=True)

    def answer(
        self,
        prompt_text: str,
        prompt: list[Message],
        completion: list[Message],
        tools: list[Any] | None,
        kwargs: Mapping[str, Any],
    ) -> tuple[str, list[Cut]]:
        """The text of a whole conversation, and its stretches after the prompt.

        Args:
            prompt_text: what :meth:`prompt` gave for ``prompt``.
            prompt: the turns before the answer.
            completion: the answer; turns that are not the assistant's may lie between its first and last one.
            tools, kwargs: what the template receives beside the messages.

        Returns:
            The text, and ``[(end, trained), ...]`` in order, the first stretch starting where the prompt ends.

        Raises:
            BadRow: the template refuses these messages.
            ValueError: the template does not continue its own prompt, or turns cannot be told apart.
        """
        messages = [*prompt, *completion]
        text = self._render(messages, tools, kwargs)
        if not text.startswith(prompt_text):
            raise ValueError(
                f"the chat template does not continue its own prompt: {_divergence(prompt_text, text)}. "
                f"The prompt's tokens would not be a prefix of the row's tokens. Make the two agree through "
                f"chat_template_kwargs (e.g. enable_thinking), or set a tokenizer.chat_template in which the answer "
                f"begins right after the generation prompt"
            )
        if len(completion) == 1:
            return text, [(len(text), True)]
        cuts = self._by_prefix(text, prompt_text, messages, len(prompt), tools, kwargs)
        if cuts is None:
            cuts = self._by_tags(text, prompt_text, messages, tools, kwargs)
        if cuts is None:
            raise ValueError(
                "the chat template writes earlier turns differently once later ones follow, so the assistant's turns "
                "cannot be told apart; use a template with {% generation %} tags, or rows with a single answer turn"
            )
        return text, cuts

    # -- stretches --------------------------------------------------------------------------------------------------
    def _by_prefix(
        self, text: str, prompt_text: str, messages: list[Message], first: int, tools: Any, kwargs: Mapping[str, Any]
    ) -> list[Cut] | None:
        """Find each turn by rendering the conversation up to it; None when that is no prefix of the whole."""
        cuts: list[Cut] = []
        position = len(prompt_text)
        for index in range(first, len(messages)):
            if messages[index]["role"] != "assistant":
                continue
            if index > first:
                header = self._render(messages[:index], tools, kwargs, add_generation_prompt=True)
                if not text.startswith(header) or len(header) < position:
                    return None
                if len(header) > position:
                    cuts.append((len(header), False))
            whole = text if index == len(messages) - 1 else self._render(messages[: index + 1], tools, kwargs)
            if not text.startswith(whole) or (cuts and len(whole) < cuts[-1][0]):
                return None
            position = len(whole)
            cuts.append((position, True))
        return cuts

    def _by_tags(
        self, text: str, prompt_text: str, messages: list[Message], tools: Any, kwargs: Mapping[str, Any]
    ) -> list[Cut] | None:
        """Find each turn by the template's own ``{% generation %}`` tags; None when it has none."""
        template = self.tokenizer.get_chat_template(None, tools)
        if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
            return None
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, spans = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **kwargs},
        )
        if rendered[0] != text:
            return None
        cuts: list[Cut] = []
        position = len(prompt_text)
        for start, end in cast(list[tuple[int, int]], spans[0]):
            # Some templates close the tag before the token that ends the turn: it is the assistant's all the same.
            end += next((len(token) for token in self.end_tokens if token and text.startswith(token, end)), 0)
            if end <= position:
                continue
            if start > position:
                cuts.append((start, False))
            cuts.append((end, True))
            position = end
        return cuts or None

    # -- the template -----------------------------------------------------------------------------------------------
    def _render(self, messages: list[Message], tools: Any, kwargs: Mapping[str, Any], **options: Any) -> str:
        import jinja2

        if not self.tokenizer.chat_template:
            raise ValueError(
                "the data holds messages but the tokenizer has no chat template; set tokenizer.chat_template, take the "
                "tokenizer of a chat model, or give the prompt and the answer as text"
            )
        if reserved := sorted(_RESERVED & kwargs.keys()):
            raise ValueError(f"chat_template_kwargs may hold variables of the template only, got {reserved}; drop them")
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **{**kwargs, **options})
        except jinja2.exceptions.SecurityError as error:
            raise ValueError(f"the chat template tried what its sandbox forbids: {error}; do not use it") from error
        except (jinja2.exceptions.TemplateError, TypeError) as error:
            said = (str(error) or repr(error)).splitlines()[0][:80]
            raise BadRow(f"{TEMPLATE_REFUSED}: {said}") from None


def _divergence(prompt_text: str, text: str) -> str:
    same = next((i for i, (a, b) in enumerate(zip(prompt_text, text, strict=False)) if a != b), len(text))
    start = max(0, same - 20)
    return f"the prompt goes on {prompt_text[start : same + 20]!r}, the whole conversation {text[start : same + 20]!r}"
