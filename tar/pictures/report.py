"""The report: one or more runs on a page of HTML that needs no other file (--report)."""

import base64
import html
import io

from tar import UserError
from tar.evaluation.average_precision import recall_curves
from tar.evaluation.compare_runs import FIGURES
from tar.evaluation.detect import detect
from tar.evaluation.markdown import cell
from tar.pictures.charts import COLOURS, recall_chart, training_charts
from tar.pictures.images_to_show import flags_of, load_test_image, open_test_set
from tar.pictures.models_to_show import StudentAndTeacher
from tar.tables.rows import command_of
from tar.training import checkpoint

PANELS = 2  # images of the test set whose panel is shown, of each run
STYLE = """
* { box-sizing: border-box; }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 1240px; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin-bottom: .3rem; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; } td, th { padding: .15rem .5rem; text-align: right;
  border-bottom: 1px solid var(--line); white-space: nowrap; } th { white-space: normal; }
td:first-child, th:first-child { text-align: left; }
pre { background: color-mix(in srgb, var(--ink) 7%, var(--paper)); padding: .6rem; overflow-x: auto; }
svg { width: 100%; max-width: 640px; height: auto; display: block; } svg text { fill: var(--ink); font-size: 12px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { color: var(--pale); font-size: .85rem; }
img { max-width: 100%; height: auto; background: #fff; } .note { color: var(--pale); }
"""


def report(runs, process, threshold, given):
    """The text of the HTML page.

    Args:
        runs: list of tar.evaluation.compare_runs.Run, all of the same test set.
        threshold: least score of a detection in the pictures.
        given: flags of eval.py that replace the runs' own.
    """
    sections = {"Results": results_table(runs) + "<h3>By class</h3>" + class_table(runs)}
    sections["Training"] = training_charts(runs)
    try:
        source = open_test_set(flags_of(runs[0].settings, **given), tuple(runs[0].result["per_class"]))
        sections["Precision and recall"] = recall_chart({r.name: recall_of(r, source, process) for r in runs})
    except UserError as error:
        source = None
        sections["Detections"] = note(error)
    for run in runs if source else []:
        try:
            models = StudentAndTeacher(run.weights, process, given.get("teacher_weights"))
            images = [load_test_image(source, index) for index in range(min(PANELS, len(source)))]
            panels = [png(models.panel(*image, threshold, name), f"{run.name}: {name}") for name, *image in images]
            sections[f"Pictures of {run.name}"] = "".join(panels)
        except UserError as error:
            sections[f"Pictures of {run.name}"] = note(error)
    sections["Settings"] = settings_table(runs)
    commands = ""
    for run in runs:
        words = "--seed", run.settings["seed"], "--output", run.folder
        commands += f"{run.name}:\n{command_of(flags_of(run.settings), *words)}\n\n"
    sections["Commands"] = f"<pre>{html.escape(commands)}</pre>"
    return page(", ".join(run.name for run in runs), sections)


def recall_of(run, source, process):
    """A run's curves for recall_chart()."""
    model = process.place(checkpoint.load_detector(run.weights)[0])
    with process.autocast():
        results = detect(model, source, process.device, 8, progress=process.progress(run.name))
    return recall_curves(results, source.classes, source if hasattr(source, "dataset") else None)


def results_table(runs):
    names = [name for name in FIGURES if any(name in run.result for run in runs)]
    header = ["run", *names, "parameters (M)", "epochs", "training minutes", "ms an image"]
    rows = []
    for run in runs:
        r = run.result
        cost = r["parameters"] / 1e6, r["epochs"], r["seconds"] / 60, r["ms_per_image"]
        rows.append([run.name, *map(r.get, names), *cost])
    return table(header, rows)


def class_table(runs):
    """AP of each class."""
    classes = runs[0].result["per_class"]
    rows = [[name, *(run.result["per_class"][name]["AP"] for run in runs)] for name in classes]
    return table(["class (AP)", *(run.name for run in runs)], rows)


def settings_table(runs):
    """Settings and environment."""
    each = [{**run.settings, **run.result.get("environment", {})} for run in runs]
    names = {name: None for settings in each for name in settings}  # in order
    rows = [[name, *(_word(settings.get(name)) for settings in each)] for name in names]
    return table(["setting", *(run.name for run in runs)], rows)


def note(error):
    return f'<p class="note">Left out: {html.escape(str(error))}</p>'


def _word(value):
    return "-" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)


def table(header, rows):
    """A table as HTML; floats have one digit."""
    head = "".join(f"<th>{html.escape(h)}</th>" for h in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell(v))}</td>" for v in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def png(picture, caption):
    """A picture of PIL inside of the page."""
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    data, text = base64.b64encode(file.getvalue()).decode(), html.escape(caption)
    return f'<figure><img src="data:image/png;base64,{data}" alt="{text}"/><figcaption>{text}</figcaption></figure>'


def page(title, sections):
    """The whole page. sections: {heading: HTML}."""
    body = "".join(f"<section><h2>{html.escape(head)}</h2>{text}</section>\n" for head, text in sections.items())
    head = '<meta charset="utf-8"/><meta name="viewport" content="width=device-width, initial-scale=1"/>'
    head += f'<link rel="icon" href="data:,"/><title>{html.escape(title)}</title><style>{COLOURS}{STYLE}</style>'
    body = f"<body><h1>{html.escape(title)}</h1>\n{body}</body>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n{body}</html>\n'
