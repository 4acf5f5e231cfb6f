"""Pictures: panels of the method and detections (--show, --predict), charts, the report (--report), --export."""
