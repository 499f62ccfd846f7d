"""lm-evaluation-harness' own client for completions on a small local task: evaluation.py URL DECDEC MODEL FOLDER.

Three numbers must agree: the log-likelihoods that lm_eval reads from the server, those of a whole window by `decdec eval`
(as perplexity), and the choices of a small task of several answers each, which has a known best answer."""

import json
import math
import pathlib
import subprocess
import sys

from lm_eval import simple_evaluate
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

url, program, model, folder = sys.argv[1], sys.argv[2], sys.argv[3], pathlib.Path(sys.argv[4])
lm = LocalCompletionsAPI(base_url=f"{url}/v1/completions", model="m", tokenizer_backend="remote", tokenized_requests=True,
                         num_concurrent=4, max_length=2048, timeout=300)
# One window of text: its log-likelihood is what decdec eval says of it.
text = pathlib.Path(__file__).parents[2].joinpath("tests/data/botchan.txt").read_text()[2000:8000]
folder.mkdir(parents=True, exist_ok=True)
folder.joinpath("window.txt").write_text(text)
said = subprocess.run([program, "eval", "perplexity", model, "--text", folder / "window.txt", "--seq-len", "256",
                       "--windows", "0..1", "--json", *sys.argv[5:]], capture_output=True, text=True, check=True)
own = json.loads(said.stdout)["perplexity"]
ids = lm.tok_encode(text)[:256]
scores = lm._loglikelihood_tokens([(("", text), ids[:1], ids[1:])])
served = math.exp(-scores[0][0] / 255)
# Each logarithm is told as a float32.
assert abs(served / own - 1) < 2e-6, (served, own)
print(f"perplexity of a window: {served:.6f} by lm_eval, {own:.6f} by decdec eval")
# A task of our own: which of four words goes on.
rows = [("The capital of France is", ["Paris", "banana", "seven", "quickly"]),
        ("Two plus two is", ["four", "purple", "Rome", "swim"]),
        ("The opposite of hot is", ["cold", "chair", "under", "nine"]),
        ("A week has seven", ["days", "moons", "eats", "blue"]),
        ("The sun rises in the", ["east", "fork", "jumping", "wool"])]
folder.joinpath("rows.json").write_text("\n".join(
    json.dumps({"question": q, "choices": c, "answer": 0}) for q, c in rows))
folder.joinpath("ours.yaml").write_text(f"""task: decdec_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder.absolute()}/rows.json}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}]
""")
tasks = TaskManager(include_path=str(folder.absolute()))
result = simple_evaluate(model=lm, tasks=["decdec_words"], task_manager=tasks, log_samples=True, bootstrap_iters=0)
for sample in result["samples"]["decdec_words"]:
    question = sample["doc"]["question"]
    for (likelihood, _), choice in zip(sample["filtered_resps"], sample["doc"]["choices"]):
        context, whole = lm.tok_encode(question), lm.tok_encode(f"{question} {choice}")
        again = lm._loglikelihood_tokens([(("", ""), context, whole[len(context):])])[0][0]
        assert likelihood == again, (question, choice, likelihood, again)
accuracy = result["results"]["decdec_words"]["acc,none"]
assert accuracy >= 0.8, accuracy
print(f"accuracy {accuracy} on {len(rows)} questions, perplexity {served:.6f} as decdec eval's {own:.6f}")
