"""A run directory as a model of lm-evaluation-harness, which this file imports.

from research.evaluate.harness.harness_model import HarnessModel
lm_eval.simple_evaluate(HarnessModel("runs/finetune_dolly"), tasks=["arc_easy"])
"""

from collections.abc import Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from research.core.errors import look_up
from research.evaluate.harness.harness_texts import HarnessTexts
from research.runs.reopen import reopen

NAME = "research-run"
BASE, TUNED = MODELS = "base", "tuned"

Ids = list[int]


@register_model(NAME)
class HarnessModel(TemplateLM):
    """The tuned model of a run, or the one that its training began from."""

    def __init__(
        self,
        run: str,
        step: str = "latest",
        model: str = TUNED,
        # The harness gives these to every model; the engine knows its own sizes.
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
    ):
        """Reads the parameters.

        Args:
          run: its directory.
          step: the checkpoint: latest, best, or a number.
          model: `tuned` or `base`. The harness names its results by it.
          batch_size, max_batch_size, device: have no effect.

        Raises:
          UserError: there is no such run, step or model.
        """
        super().__init__()
        look_up(dict.fromkeys(MODELS), model, "model")
        opened = reopen(str(run), step=str(step), in_compute_dtype=True)
        generator = opened.generators(compare=model == BASE)[model]
        self._texts = HarnessTexts(generator, opened.prompts)
        self._end = opened.base.tokenizer.eos
        self._name = f"{opened.base.tokenizer.fingerprint[:12]}-{opened.system}"

    @property
    def eot_token_id(self) -> int:
        return self._end

    @property
    def prefix_token_id(self) -> int:
        return self._texts.start

    @property
    def tokenizer_name(self) -> str:
        return self._name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> Ids:
        return self._texts.encode(string, add_special_tokens is not False)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Conversations are put to the model as in training, by whatever template."""
        self._texts.in_conversations = bool(chat_template)
        return "as in training" if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self._texts.render(chat_history, add_generation_prompt)

    def _encode_pair(self, context: str, continuation: str) -> tuple[Ids, Ids]:
        ids = self._texts.conversation(context)
        if ids is None:
            return super()._encode_pair(context, continuation)
        return ids, self.tok_encode(continuation, add_special_tokens=False)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, Ids, Ids]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        found = []
        scores = self._texts.score((context, ids) for _, context, ids in requests)
        named = zip(requests, scores, strict=True)
        for (texts, _, _), score in tqdm(
            named, "scores", len(requests), disable=disable_tqdm
        ):
            found.append((score.logprob, score.is_greedy))
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, found[-1])
        return found

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        found = []
        for (text,) in tqdm([x.args for x in requests], "texts", disable=disable_tqdm):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._texts.longest - 1,
                context_len=1,
            )
            pairs = map(utils.make_disjoint_window, windows)
            found.append(sum(score.logprob for score in self._texts.score(pairs)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def generate_until(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[str]:
        found = []
        asked = [request.args for request in requests]
        answers = zip(asked, self._texts.answers(asked), strict=True)
        for args, answer in tqdm(answers, "answers", len(asked), disable=disable_tqdm):
            found.append(answer)
            self.cache_hook.add_partial("generate_until", args, answer)
        return found
