"""lexplain as an Airflow DAG: one task a stage, each submitted with spark-submit, all with the same plan.

Put this file into the DAG folder. A retry submits the very same command, so that it resumes the run where the failed try
left it; what is finished is not made again. Needs Airflow 3.3 and apache-airflow-providers-apache-spark; the connection names
the cluster, with its deploy mode and secrets.
"""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

from airflow.providers.apache.spark.operators.spark_submit import SparkSubmitOperator
from airflow.sdk import DAG, Param, chain
from airflow.sdk.definitions.retry_policy import RetryDecision, RetryPolicy

# --- to change ----------------------------------------------------------------------------------------------------
PLAN = "/mnt/lexplain/plan.yaml"  # a path that the driver reads; another one can be given when the DAG is triggered
REPORT = "/mnt/lexplain/report.html"
METHODS = "integrated_gradients,lrp"  # that the task evaluate compares
JOBS = "/opt/lexplain/jobs"  # the project's folder jobs/, where the driver runs; local:///opt/lexplain/jobs in an image
CONNECTION = "spark_default"
SCHEDULE = None  # or "@weekly": new documents of the corpus are added, what was explained stays
EXECUTORS: dict[str, Any] = {"num_executors": 4, "executor_cores": 8, "executor_memory": "8g", "driver_memory": "4g"}
SETTINGS = {
    # Delta: its JARs come with the cluster or the image, otherwise by packages=; these two act only when the JVM starts.
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
    # Models and batches live in Python, outside of the JVM's memory.
    "spark.executor.memoryOverhead": "16g",
    # Documents a batch that the JVM hands to Python: of long ones, Spark's 10000 fill the overhead.
    "spark.sql.execution.arrow.maxRecordsPerBatch": "512",
}
GPU_SETTINGS = {
    # One GPU an executor and one task a GPU: two tasks would hold two copies of each model in its memory.
    "spark.executor.resource.gpu.amount": "1",
    "spark.executor.resource.gpu.vendor": "nvidia.com",  # Kubernetes only; others pass over it
    "spark.executor.resource.gpu.discoveryScript": "/opt/lexplain/discover-gpus.sh",
    "spark.task.resource.gpu.amount": "1",
    # A Python worker that waits keeps its models in the GPU's memory: one a GPU.
    "spark.python.factory.idleWorkerMaxPoolSize": "1",
}
# ------------------------------------------------------------------------------------------------------------------


class RetryWhatFailed(RetryPolicy):
    """No second try of a bad plan (exit code 2), nor past a limit of the plan (3): it would count from zero again.

    YARN keeps the codes for itself in cluster mode: there, these are tried again too.
    """

    def evaluate(
        self, exception: BaseException, try_number: int, max_tries: int, context: Any | None = None
    ) -> RetryDecision:
        """Tell by the exit code of spark-submit, or of a driver on Kubernetes, in the operator's message. Runs on the worker."""
        ended = re.search(r"(?:Error|spark exit) code is: ([23])\b", str(exception))
        if ended is not None:
            return RetryDecision.fail(f"exit code {ended[1]}: the same command would end alike")
        return RetryDecision.default()


def submit(stage: str, *arguments: str, gpus: bool) -> SparkSubmitOperator:
    """Return the task of a stage; `gpus` where models run."""
    return SparkSubmitOperator(
        task_id=stage,
        application=f"{JOBS}/{stage}.py",
        application_args=["{{ params.plan }}", *arguments],
        name=f"lexplain {stage}",
        conn_id=CONNECTION,
        conf={**SETTINGS, **(GPU_SETTINGS if gpus else {})},
        **EXECUTORS,
    )


with DAG(
    dag_id="lexplain",
    description="Which words make a text classifier see a text as each class",
    schedule=SCHEDULE,
    catchup=False,
    max_active_runs=1,  # two would write the same rows
    params={"plan": Param(PLAN, type="string", description="the plan, a YAML file")},
    default_args={
        "retries": 3,
        "retry_delay": timedelta(minutes=5),
        "retry_policy": RetryWhatFailed(),
    },
    tags=["lexplain"],
):
    chain(
        submit("fine_tune", gpus=True),
        submit("attribute", gpus=True),
        submit("aggregate", gpus=False),
        submit("evaluate", "--methods", METHODS, gpus=True),
        submit("report", "--out", REPORT, gpus=False),
    )
