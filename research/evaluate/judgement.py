"""From losses and answers to an evaluation: numbers, intervals, comparisons, words."""

import dataclasses
import statistics as averages
from collections.abc import Mapping, Sequence
from typing import Any

from research.evaluate.answer_metrics.answer_metric import POINTS, SHARE, AnswerMetric
from research.evaluate.answered_row import AnsweredRow
from research.evaluate.loss_values import LOSSES, CommonLosses
from research.evaluate.statistics.measured import Measured
from research.evaluate.statistics.paired import Judged, compare, compare_runs, estimate
from research.evaluate.statistics.row_clusters import clusters_of
from research.evaluate.statistics.verdicts import BETTER, WORSE

SCALES = {SHARE: 1.0, POINTS: 0.01}  # Factors to 0 to 1, of units with an end.
MOST_SHOWN = 10  # worst regressions, and best gains, of each run
Values = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Measurements:
    """The measurements of several models on the same rows.

    Attributes:
      rows: that all models answered, as each answered them; no model has any where
        whole texts are measured.
      metrics: by name.
      measured: by model and metric, among them the loss that can be compared.
      clusters: the cluster of each row.
      categories: the category of each row, or the source of each text.
      said: by model what it answered or chose in each row, for `rows.jsonl`.
    """

    rows: Mapping[str, Sequence[AnsweredRow]]
    metrics: Mapping[str, AnswerMetric]
    measured: Mapping[str, Mapping[str, Measured]]
    clusters: Sequence[int]
    categories: Sequence[str]
    said: Mapping[str, Sequence[Values]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_texts(
        cls, losses: CommonLosses, sources: Mapping[str, str], clusters: Sequence[int]
    ) -> "Measurements":
        """The losses of whole texts; `sources` and `clusters` are in one order."""
        measured = {name: losses.measure(name, [*sources]) for name in losses.sums}
        return cls({}, {}, measured, clusters, [*sources.values()])

    @classmethod
    def of(
        cls,
        rows: Mapping[str, Sequence[AnsweredRow]],
        losses: CommonLosses,
        metrics: Mapping[str, Mapping[str, AnswerMetric]],
        said: Mapping[str, Sequence[Values]],
    ) -> "Measurements":
        """Computes every metric of every model; `metrics` are by model and name."""
        measured: dict[str, dict[str, Measured]] = {}
        for name, own in rows.items():
            measured[name] = losses.measure(name, [row.id for row in own])
            measured[name] |= {k: x.measure(own) for k, x in metrics[name].items()}
        first, names = (next(iter(x.values())) for x in (rows, metrics))
        categories = [row.category for row in first]
        return cls(rows, names, measured, clusters_of(first), categories, said)

    @property
    def first(self) -> Sequence[AnsweredRow]:
        """The rows themselves, whatever the answers."""
        return next(iter(self.rows.values()), ())

    def higher_is_better(self, metric: str) -> bool | None:
        return False if metric in LOSSES else self.metrics[metric].higher_is_better

    def by_category(self) -> dict[str, list[int]]:
        """The places of the rows of each category; empty if there is but one."""
        found: dict[str, list[int]] = {}
        for place, category in enumerate(self.categories):
            found.setdefault(category, []).append(place)
        return dict(sorted(found.items())) if len(found) > 1 else {}

    def answers_of(self, model: str) -> Values:
        """Each metric of a model: its value, interval and rows; by category, too."""
        parts = self.by_category()
        return {
            name: _plain(estimate(measured, self.clusters))
            | {
                "by_category": {
                    category: _plain(
                        estimate(
                            measured.subset(rows), [self.clusters[i] for i in rows]
                        )
                    )
                    for category, rows in parts.items()
                }
            }
            for name, measured in self.measured[model].items()
        }

    def judge(self, baseline: str) -> dict[str, dict[str, Judged]]:
        """Every other model against `baseline`, by metric."""
        others = {k: v for k, v in self.measured.items() if k != baseline}
        names = self.measured[baseline]
        better = {name: self.higher_is_better(name) for name in names}
        return compare_runs(self.measured[baseline], others, self.clusters, better)

    def comparisons(self, baseline: str) -> Values:
        """`judge` as plain values; differences by category are not tested."""
        parts = self.by_category()
        found: Values = {}
        for model, by_metric in self.judge(baseline).items():
            found[model] = {}
            for metric, judged in by_metric.items():
                before = self.measured[baseline][metric]
                after = self.measured[model][metric]
                found[model][metric] = {
                    **dataclasses.asdict(judged.comparison),
                    "adjusted_p": judged.adjusted_p,
                    "verdict": judged.verdict,
                    "by_category": {
                        category: _plain(
                            compare(
                                before.subset(rows),
                                after.subset(rows),
                                [self.clusters[i] for i in rows],
                            )
                        )
                        for category, rows in parts.items()
                    },
                }
        return found

    def changes(
        self, baseline: str, model: str
    ) -> tuple[str, list[tuple[float, AnsweredRow]]]:
        """How much better each row is answered than by `baseline`, the worst first.

        A row's change is the mean, from -1 to 1, over the metrics with a reference
        that apply to it. Rows to which none applies are missing. If these are all, a
        user's own metric ranks the rows, or else the loss; its name comes first.
        """
        better = {
            name: (1 if up else -1)
            for name in self.measured[baseline]
            if name in self.measured[model]
            if (up := self.higher_is_better(name)) is not None
        }
        shared = {
            name: SCALES[metric.unit] * better[name]
            for name, metric in self.metrics.items()
            if metric.needs_reference and metric.unit in SCALES and name in better
        }
        own = [name for name in better if ":" in name]
        for by in ("", *own, *(name for name in better if name in LOSSES)):
            judges = {by: better[by]} if by else shared
            if ranked := self._rank(judges, baseline, model):
                return by, ranked
        return "", []

    def _rank(
        self, judges: Mapping[str, float], baseline: str, model: str
    ) -> list[tuple[float, AnsweredRow]]:
        found = []
        for place, row in enumerate(self.first):
            parts = []
            for name, sign in judges.items():
                before, after = (
                    self.measured[x][name].scores[place] for x in (baseline, model)
                )
                if before is not None and after is not None:
                    parts.append(sign * (after - before))
            if parts:
                found.append((averages.fmean(parts), row))
        return sorted(found, key=lambda pair: (pair[0], pair[1].id))


def find_contradictions(comparisons: Mapping[str, Values]) -> list[str]:
    """Sentences to read first: the loss falls, and answers get worse."""
    found = []
    for model, by_metric in comparisons.items():
        worse = [
            f"{name} {values['baseline']:.3g} to {values['candidate']:.3g}"
            for name, values in by_metric.items()
            if name not in LOSSES and values["verdict"] == WORSE
        ]
        falls = any(by_metric.get(x, {}).get("verdict") == BETTER for x in LOSSES)
        if worse and falls:
            found.append(
                f"the perplexity of {model} falls while its answers get worse: "
                f"{', '.join(worse)}; judge it by its answers"
            )
    return found


def _plain(found: Any) -> Values:
    return dataclasses.asdict(found) if found else {}
