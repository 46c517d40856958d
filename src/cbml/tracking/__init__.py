"""MLflow. The only rooms that know it: `store` (where it is), `model`, `run` (open for logging) and `ui`.

What MLflow reads from the environment when it is imported is set here, before any of them imports it.
"""

import logging
import os

# Fail within a minute where a server cannot be reached; no progress bars; telemetry off.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

# Tracebacks of what is caught here; remarks on packages, examples, descriptions that are cut, and threads.
QUIET = ("store.db.utils", "pyfunc", "utils.environment", "utils.validation", "system_metrics.system_metrics_monitor")
for name in QUIET:
    logging.getLogger(f"mlflow.{name}").setLevel(logging.CRITICAL)
