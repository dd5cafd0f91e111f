"""A datum as text, to see what is learnt."""

from __future__ import annotations

from typing import Any, List, Tuple

from tinkex.errors import InvalidInputError
from tinkex.types import Datum

#: What a tokenizer writes for an incomplete character.
_INCOMPLETE = "\ufffd"
#: A character has up to 4 bytes, so that no more than 4 tokens make one.
_MOST_TOKENS = 4


def weighted_tokens(datum: Datum, tokenizer: Any) -> List[Tuple[str, float]]:
    """Return the text and the weight of each token of *datum*, in order.

    The texts join to that of the datum; of tokens that make one character together, the last has
    it, and the others are empty.  The weights are ``weights``, or else ``advantages``, or else 1;
    the first token has weight 0, since it is not a target.

    Raises:
        InvalidInputError: the datum has images, or not one target token for each input token.
    """
    inputs = datum.loss_fn_inputs
    ids = datum.model_input.to_ints()
    targets = inputs["target_tokens"].values.tolist() if "target_tokens" in inputs else []
    if len(targets) != len(ids) or not ids:
        raise InvalidInputError("the datum does not have one target token for each input token")
    ids.append(targets[-1])
    weights = inputs.get("weights", inputs.get("advantages"))
    after = [1.0] * len(targets) if weights is None else weights.values.tolist()
    return list(zip(_texts(ids, tokenizer), [0.0, *after]))


def _texts(ids: List[int], tokenizer: Any) -> List[str]:
    texts: List[str] = []
    before: List[int] = []  # the tokens of the text before: some decoders strip a leading space
    group: List[int] = []
    for place, token in enumerate(ids):
        group.append(token)
        head = tokenizer.decode(before)
        text = tokenizer.decode(before + group)[len(head) :]
        last = place + 1 == len(ids)
        if text.endswith(_INCOMPLETE) and len(group) < _MOST_TOKENS and not last:
            texts.append("")
            continue
        texts.append(text)
        before, group = group, []
    return texts
