"""The command that answers SQL of other programs."""

from __future__ import annotations

import shlex
import signal
from pathlib import Path
from typing import Annotated

import typer

from lexplain.cli.console import BAD_PLAN, DEMO_TABLES, find_sink, load_plan, open_terminal, refuse
from lexplain.errors import PlanError

_QUERY = "SELECT label, word, rank FROM keywords_current WHERE rank <= 3"


def serve_sql_command(
    plan: Annotated[Path | None, typer.Argument(help="Serve the tables of its sink.", metavar="[PLAN.yaml]")] = None,
    tables: Annotated[
        str | None,
        typer.Option(help=f"Or folder or schema of tables; {DEMO_TABLES} when both are left out.", metavar="PLACE"),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at. There is no password.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Its port.", min=1, max=65535)] = 10000,
) -> None:
    """Let other programs query the tables, views and explain(text) by JDBC, ODBC or Python (HiveServer2), until Ctrl-C.

    Example: lexplain serve-sql --tables lexplain-tables
    """
    if plan is not None and tables is not None:
        raise typer.BadParameter("PLAN.yaml and --tables exclude each other.")
    try:
        loaded = None if plan is None else load_plan(plan)
    except PlanError as error:
        raise refuse(error, BAD_PLAN) from None
    with open_terminal("serve-sql", None) as terminal:
        from lexplain.methods import find_method
        from lexplain.pipeline import open_tables
        from lexplain.session import check_port, find_beeline, serve_thrift, wait_for_jvm
        from lexplain.tables import check_version

        sink = find_sink(tables or DEMO_TABLES) if loaded is None else loaded.sink
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the session is stopped
        check_port(host, port)  # before Spark starts
        if sink.path is not None:
            check_version(Path(sink.path))
        spark = terminal.open_session("lexplain serve-sql")
        open_tables(spark, sink, find_method)
        with serve_thrift(spark, host, port):
            url = f"jdbc:hive2://{host}:{port}"
            command = f"{find_beeline()} -u {url} -e {shlex.quote(_QUERY)}"
            terminal.console.print(f"serving  {sink.path or sink.schema}", markup=False)
            terminal.console.print(f"JDBC     {url}", markup=False)
            terminal.console.print(f"beeline  {command}", markup=False, soft_wrap=True)
            terminal.console.print(
                f'Python   impala.dbapi.connect(host="{host}", port={port}, auth_mechanism="PLAIN")  # pip install impyla',
                markup=False, soft_wrap=True,
            )  # fmt: skip
            terminal.console.print(
                "There is no password: whoever reaches the port may do what you may. Ctrl-C ends it."
            )
            try:
                wait_for_jvm(spark)
            except KeyboardInterrupt:
                terminal.console.print("ended")
