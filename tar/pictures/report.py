"""The report: one or more runs on a page of HTML that needs no other file (--report)."""

import base64
import html
import io

from tar import UserError
from tar.evaluation.compare_runs import class_text, figures_text
from tar.pictures.charts import training_charts
from tar.pictures.images_to_show import flags_of, images_to_show, open_test_set
from tar.pictures.models_to_show import ModelsToShow

PANELS = 2  # images of the test set whose panel is shown, of each run
STYLE = """body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1240px; padding: 1rem; }
pre { background: #f4f4f4; padding: .6rem; overflow-x: auto; } img { max-width: 100%; } svg { font-size: 12px; }
figure { display: inline-block; margin: 0; width: 600px; max-width: 100%; }"""


def report(runs, threshold, given, say):
    """The text of the HTML page of runs of open_runs().

    threshold: least score of a detection in the pictures. given: flags of eval.py that replace the runs' own. say:
    prints why a run's pictures are left out.
    """
    results = {run.name: {k: v for k, v in run.result.items() if not isinstance(v, dict)} for run in runs}
    sections = {"Results": text(figures_text(results)), "Classes": text(class_text(runs))}
    sections["Training"] = training_charts(runs)
    for run in runs:
        try:
            models = ModelsToShow(run.weights, given["teacher_weights"])
            source = open_test_set(flags_of(run.settings, **given), models.classes)
            images = images_to_show([str(PANELS)], source)
            panels = [picture(models.panel(image, target, threshold, name)) for name, image, target in images]
            sections[f"Pictures of {run.name}"] = "".join(panels)
        except UserError as error:
            sections[f"Pictures of {run.name}"] = text(f"Left out: {error}")
            say(f"Pictures of {run.name} are left out: {error}")
    settings = {run.name: {k: str(v) for k, v in {**run.settings, **run.result["environment"]}.items()} for run in runs}
    sections["Settings"] = text(figures_text(settings))

    title = html.escape(", ".join(run.name for run in runs))
    body = "".join(f"<h2>{html.escape(heading)}</h2>{content}\n" for heading, content in sections.items())
    head = f'<meta charset="utf-8"/><title>{title}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><h1>{title}</h1>\n{body}</body></html>\n'


def text(words):
    return f"<pre>{html.escape(words)}</pre>"


def picture(panel):
    """A picture of PIL inside of the page."""
    file = io.BytesIO()
    panel.save(file, "PNG", optimize=True)
    return f'<img src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"/>'
