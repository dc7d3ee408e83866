"""Cards say what the report says, and what the report's texts say stays text."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from dmc_hub import cards
from dmc_hub.cards import PICTURES, adapter_card, eval_results, pipeline_card, read_report, render


def statistics(mean: float, std: float) -> dict[str, Any]:
    told = {"share_of_optimum": mean / 7.38, "success_rate": None, "normalized_score": None}
    return {"mean": mean, "std": std, **told}


def evaluation(num_candidates: int, before: tuple[float, float], after: tuple[float, float]) -> dict[str, Any]:
    return {
        "action_selection": "greedy",
        "num_candidates": num_candidates,
        "num_upsampling_passes": 0,
        "before": statistics(*before),
        "after": statistics(*after),
        "coherency_before": 0.9,
        "coherency_after": 0.8,
        "diversity_before": 0.5,
        "diversity_after": 0.25,
    }


REPORT: dict[str, Any] = {
    "task": "nav1d-full",
    "metric": "return",
    "score_name": None,
    "critic": {
        "num_steps": 4096,
        "discount": 0.99,
        "expectile": 0.7,
        "q_spearman": 0.91,
        "q_pearson": None,
        "v_spearman": 0.5,
        "v_pearson": 0.25,
        "q_gap": 1.5,
        "v_gap": -0.5,
        "share_q_above_v": 0.37,
        "fitted_expectile": 0.69,
        "highest_return": 7.4,
        "share_q_above_highest": 0.0125,
        "share_v_above_highest": 0.0,
        "bootstrapped_weight": 0.0,
    },
    "controller": "planner",
    "methods": "1 × (nft → dpo → sft)",
    "command": "dmc-hub align --task nav1d-full",
    "base_fingerprint": "0123456789abcdef" * 4,
    "num_candidates": 16,
    "episodes": 128,
    "seed": 3,
    "seeds": [2000000, 2000127],
    "validation_seeds": [1000000],
    "return_before": 6.78,
    "return_after": 7.2,
    "std_before": 0.72,
    "std_after": 0.59,
    "return_optimal": 7.38,
    "return_data": 2.2,
    "coherency_before": 0.93,
    "coherency_after": 0.91,
    "evaluations": [evaluation(1, (2.25, 1.04), (6.75, 0.5)), evaluation(16, (6.78, 0.72), (7.2, 0.59))],
    "best_of_n_control": {"num_candidates": 16, "return_mean": 6.78, "return_std": 0.72},
    "acting": {
        "action_selection": "greedy",
        "num_candidates": 16,
        "return_mean": 7.21,
        "validated": [
            {"action_selection": "greedy", "num_candidates": 1, "return_mean": 6.8},
            {"action_selection": "greedy", "num_candidates": 16, "return_mean": 7.21},
        ],
    },
    "stages": [
        {
            "stage": 0,
            "name": "foundation",
            "decision": "start",
            "return_mean": 2.2,
            "return_std": 1.0,
            "coherency": None,
            "wall_seconds": 0.0,
            "reason": "before alignment",
        }
    ],
    "collections": [],
    "drawn_episodes": None,
    "pipeline_folder": "pipeline",
    "wall_seconds": 12.0,
    "machine": "a machine",
}
FACTS = {"task": "nav1d-full", "horizon": 8, "action_space": {"low": [-1.0], "high": [None]}}


def metadata(card: str) -> dict[str, Any]:
    """The header, read as YAML without huggingface_hub."""
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert found is not None
    return yaml.safe_load(found[1])


def test_the_adapters_card_has_what_the_hub_reads() -> None:
    card = adapter_card(REPORT, repo_id="alice/lora", base_model="alice/planner", base_revision="c0ffee" * 6)
    assert ModelCard(card).data.get("eval_results") == eval_results(REPORT, "after")
    held = metadata(card)
    assert held["library_name"] == "diffusers"
    assert held["pipeline_tag"] == "reinforcement-learning"
    assert (held["base_model"], held["base_model_relation"]) == ("alice/planner", "adapter")
    assert {"dmc_hub", "lora", "planner", "nav1d-full"} <= set(held["tags"])
    (model,) = held["model-index"]
    (result,) = model["results"]
    assert model["name"] == "lora"
    assert result["task"]["type"] == "reinforcement-learning"
    assert result["dataset"] == {"type": "nav1d-full", "name": "nav1d-full"}
    assert [(metric["type"], metric["value"]) for metric in result["metrics"]] == [
        ("mean_reward", 6.75),
        ("coherency", 0.8),
        ("mean_reward", 7.2),
        ("coherency", 0.8),
    ]
    assert result["metrics"][2]["args"] == {
        "std": 0.59,
        "episodes": 128,
        "seeds": [2000000, 2000127],
        "training_seed": 3,
        "action_selection": "greedy",
        "num_candidates": 16,
    }
    assert "```bash\ndmc-hub align --task nav1d-full\n```" in card
    assert "`0123456789ab`" in card
    assert 'load_pipeline("alice/planner", revision="c0ffeec0ffee' in card


def test_the_foundations_card_has_its_own_figures() -> None:
    card = pipeline_card(
        REPORT,
        class_name="DiffuserPlannerPipeline",
        facts=FACTS,
        repo_id="alice/planner",
        adapter_repo_id="alice/lora",
        pictures=list(PICTURES),
    )
    assert ModelCard(card).data.get("eval_results") == eval_results(REPORT, "before")
    assert "base_model" not in metadata(card)
    assert "**2.25 ± 1.04**" in card
    assert 'DiffuserPlannerPipeline.from_pretrained("alice/planner")' in card
    assert 'DiffusionPipeline.from_pretrained("alice/planner", trust_remote_code=True)' in card
    assert "| horizon | 8 |" in card
    for name in PICTURES:
        assert f"]({name})" in card


def test_without_a_report_a_card_claims_nothing() -> None:
    for card in (adapter_card(None), pipeline_card(None, class_name="DiffuserPlannerPipeline", facts=FACTS)):
        assert "No evaluation was recorded" in card
        assert "model-index" not in metadata(card)


TEXTS = ("task", "controller", "methods", "command", "machine", "metric", "score_name")
INJECTIONS = {
    "yaml document": "x\n---\nlicense: evil\nbase_model: evil/evil\n---\n# evil",
    "yaml key": "x\nlicense: evil",
    "yaml tag": "!!python/object/apply:os.system ['touch evil']",
    "yaml alias": "*anchor",
    "jinja": "{{ 6 * 7 }}{% for x in range(9) %}evil{% endfor %}{{ ''.__class__.__mro__ }}",
    "html": "<script>alert('evil')</script><img src=x onerror=evil()>",
    "link": "[evil](javascript:evil) ![evil](https://evil.example/x.png) https://evil.example",
    "fence": "x\n```\n# evil\n```bash\nrm -rf /\n```",
    "ticks": "``` `evil` ``` ````",
    "table": "a | b | c\n|---|---|",
    "heading": "\n# evil\n",
    "controls": "a\x1b[31mb\x00c\x85d\u2028e\u202eevil",
}


@pytest.mark.parametrize("name", INJECTIONS)
def test_what_a_report_says_stays_text(name: str) -> None:
    hostile = copy.deepcopy(REPORT)
    for field in TEXTS:
        hostile[field] = INJECTIONS[name]
    hostile["evaluations"][1]["action_selection"] = hostile["stages"][0]["reason"] = INJECTIONS[name]
    facts = {**FACTS, "task": INJECTIONS[name], INJECTIONS[name]: "value"}
    written = {
        adapter_card(hostile, repo_id="alice/lora", base_model=INJECTIONS[name], fingerprint=INJECTIONS[name]),
        pipeline_card(hostile, class_name="DiffuserPlannerPipeline", facts=facts, repo_id="alice/planner"),
        render("report.md.jinja", hostile),
    }
    for text in written:
        body = text
        if text.startswith("---\n"):
            held = metadata(text)
            assert held["license"] == "apache-2.0"
            assert held.get("base_model", "") in ("", INJECTIONS[name])
            body = text.split("\n---\n", 1)[1]
        prose, fences = outside_code(body)
        assert "42" not in prose.replace("0.42", "")
        for forbidden in ("<script", "<img", "](javascript", "](https://evil", "https://evil", "{{", "\n# evil"):
            assert forbidden not in prose, (forbidden, prose)
        assert not any(re.search(r"[\x00-\x09\x0b-\x1f\u202e\u2028\x85]", part) for part in (prose, *fences))
        tables = [line for line in prose.splitlines() if line.startswith("|")]
        assert all(count_cells(line) in (2, 3, 5, 7) for line in tables), tables


def outside_code(text: str) -> tuple[str, list[str]]:
    """Markdown without its fenced blocks and code spans, and the blocks; fences end as CommonMark says."""
    prose, fences, fence = [], [], ""
    for line in text.split("\n"):
        ticks = re.match(r"`{3,}", line)
        if not fence and ticks:
            fence = ticks[0]
            fences.append("")
        elif fence and re.fullmatch(rf"`{{{len(fence)},}}\s*", line):
            fence = ""
        elif fence:
            fences[-1] += line + "\n"
        else:
            prose.append(line)
    assert not fence
    spans = re.compile(r"(?<![`\\])(`+)(?!`).*?(?<!`)\1(?!`)")
    return "\n".join(spans.sub("", line) for line in prose), fences


def count_cells(line: str) -> int:
    return len(re.findall(r"(?<!\\)\|", line)) - 1


def test_fences_of_python_hold_one_literal_for_each_name() -> None:
    card = adapter_card(None, repo_id='x")\nimport os; os.system("evil', base_model="a/b")
    (block,) = outside_code(card.split("\n---\n", 1)[1])[1]
    code = compile(block, "card", "exec")
    assert "os" not in code.co_names
    assert "system" not in code.co_names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": None}, "task must be a str, got None"),
        ({"episodes": "many"}, "episodes must be a int, got 'many'"),
        ({"return_after": True}, "return_after must be a float, got True"),
        ({"evaluations": []}, "there is no evaluation in it"),
        ({"return_after": float("nan")}, "it holds NaN"),
    ],
)
def test_a_report_that_is_none_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps({**REPORT, **change}))
    with pytest.raises(ValueError, match=message):
        read_report(path)
    path.write_text(json.dumps(REPORT))
    assert read_report(path) == REPORT
    path.write_text("[1]")
    with pytest.raises(ValueError, match="it holds a list"):
        read_report(path)


def test_templates_of_the_package_alone_are_rendered() -> None:
    """A value that looks like a template is written as text, and a template cannot leave its sandbox."""
    assert "{{ 6 * 7 }}" not in cards._escaped("{{ 6 * 7 }}")
    assert cards._escaped(cards.Verbatim("*")) == "*"
    assert cards._code("a`b``c") == "``` a`b``c ```"


def test_the_report_shows_success_and_score_where_the_task_has_them() -> None:
    plain = render("report.md.jinja", REPORT)
    assert "| selection | candidates | return before | after | share of optimum |" in plain
    assert "| `min(Q1, Q2)` | 0.910 |  | +1.500 | 1.2 % |" in plain
    assert "in 37.0 % of the steps (1 - expectile: 30.0 %)" in plain
    told = {"success_rate": 0.25, "normalized_score": 61.5}
    rows = [{**row, **{when: {**row[when], **told} for when in ("before", "after")}} for row in REPORT["evaluations"]]
    hopper = render("report.md.jinja", {**REPORT, "evaluations": rows, "score_name": "D4RL's score"})
    assert "| return before | after | success before → after | D4RL's score before → after |" in hopper
    assert hopper.count("| 25.0 % → 25.0 % | 61.50 → 61.50 |") == 2
    push_t = {"metric": "maximal coverage", "score_name": "maximal coverage"}
    pushed = render("report.md.jinja", {**REPORT, **push_t, "evaluations": rows})
    assert "| maximal coverage before | after | success before → after | share of optimum |" in pushed
    assert pushed.count("| 25.0 % → 25.0 % | 97.6 % |") == 1
    assert "The data's own episodes earn 2.20." in plain
    assert "The data's own episodes earn a return of 2.20." in pushed  # not comparable with coverage
    for text in (plain, hopper, pushed):
        table = [line for line in text.splitlines() if line.startswith("|")][:4]
        assert len({line.count("|") for line in table}) == 1
