"""The models of a server by name: how each is prompted, and which adapter it is."""

import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from research.core.errors import UserError
from research.engine.requests import Sampling
from research.serve.api.answer_shapes import TokenTexts
from research.serve.api.api_errors import bad_request, unknown_model
from research.serve.api.request_types import ChatMessage, message_text
from research.tokenize.conversation import Turn

if TYPE_CHECKING:
    # They import JAX, and the server listens before that is there.
    from research.engine.continuous_batching import Engine
    from research.runs.answering.open_for_answering import ServedModel
    from research.tokenize.tokenizer import Tokenizer

CHAT_ROLES = {"developer": "system"}


@dataclasses.dataclass(frozen=True)
class NamedModel:
    """One name that a request can ask for.

    Attributes:
      served: what answers: its name, where it comes from, and how it is prompted.
      tokenizer: of its ids.
      defaults: how tokens are chosen where a request does not say it.
      fingerprint: of what decides its answers.
      created: when it was loaded, in seconds since 1970.
    """

    served: "ServedModel"
    tokenizer: "Tokenizer"
    defaults: Sampling
    fingerprint: str
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @property
    def name(self) -> str:
        """By which clients ask for it."""
        return self.served.name

    @property
    def adapter(self) -> str:
        """The name of its adapter in the engine; "" for the base model."""
        return self.name if self.served.parent else ""

    def card(self, context: int) -> dict[str, object]:
        """The object of `/v1/models`."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "research",
            "root": self.served.root,
            "parent": self.served.parent or None,
            "max_model_len": context,
            "step": self.served.step if self.served.address else None,
            "system_fingerprint": self.fingerprint,
        }

    def encode_chat(
        self, messages: Sequence[ChatMessage], context: str = ""
    ) -> list[int]:
        """Ids of a conversation up to where the answer begins.

        `context` goes where that of a training row goes: behind the first user message.

        Raises:
          ApiError: a message is no text, or the template refuses the conversation.
        """
        if not self.served.is_chat:
            raise bad_request(
                f"model {self.name!r} continues text and has no chat template: use "
                "/v1/completions",
                "model",
            )
        turns = [
            Turn(CHAT_ROLES.get(message.role, message.role), message_text(message, i))
            for i, message in enumerate(messages)
        ]
        try:
            return self.served.prompts.encode_prompt(turns, context)
        except UserError as error:
            raise bad_request(str(error), "messages") from error

    def encode_text(self, text: str, with_start: bool) -> list[int]:
        """Ids of a text to be continued; `with_start` puts the model's mark before it.

        Control tokens in the text are letters: only a template writes them.
        """
        return self.served.prompts.encode_text(text, with_start)


class ModelNames:
    """All models of a server by name. Names change while it runs, on any thread."""

    def __init__(self, models: Sequence[NamedModel]):
        """`models` has at least one; the first is that of requests without a name."""
        self._models = {model.name: model for model in models}
        self._lock = threading.Lock()

    def find(self, name: str | None) -> NamedModel:
        """The model of a name. Raises ApiError: 404."""
        models = self._models
        if name is None:
            return next(iter(models.values()))
        if name not in models:
            raise unknown_model(name, models)
        return models[name]

    def all(self) -> list[NamedModel]:
        """The models in the order in which they were named."""
        return [*self._models.values()]

    def put(self, model: NamedModel) -> None:
        """Adds a model, or replaces the one of its name."""
        with self._lock:
            self._models = self._models | {model.name: model}

    def remove(self, name: str) -> None:
        """Forgets a model; requests that have it keep it."""
        with self._lock:
            self._models = {k: v for k, v in self._models.items() if k != name}


@dataclasses.dataclass(frozen=True)
class Deployment:
    """An engine that is ready, and the models that it answers with.

    Attributes:
      engine: answers.
      models: by name.
      context: the most tokens of a prompt and its answer together.
      slots: how many answers are made at a time.
      vocabulary: ids are below this.
      adapter_rows: how many adapters can be loaded at a time.
      load: `load(name, run, inplace)` loads the adapter of a run directory. Raises
        ApiError or UserError: it cannot, and nothing has changed.
      unload: `unload(name)` forgets an adapter. Raises ApiError: there is none.
      follow: reads again what has a newer checkpoint.
      end: lets other processes end, too; it is called after the last round.
    """

    engine: "Engine"
    models: ModelNames
    context: int
    slots: int
    vocabulary: int
    adapter_rows: int
    load: Callable[[str, str, bool], None]
    unload: Callable[[str], None]
    follow: Callable[[], None]
    end: Callable[[], None]


@functools.lru_cache(8)
def token_texts(tokenizer: "Tokenizer") -> TokenTexts:
    """The texts of the tokens of a tokenizer, remembered between requests."""
    return TokenTexts(tokenizer)
