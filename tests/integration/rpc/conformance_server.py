"""The conformance application in a process of its own; its settings are the first argument, as JSON."""

import json
import sys

from tests.integration.rpc.conformance_app import ConformanceSettings

from penstock.rpc.errors import StartupError
from penstock.rpc.launch import run

if __name__ == "__main__":
    try:
        run(ConformanceSettings.load(json.loads(sys.argv[1])), "tests.integration.rpc.conformance_app:application")
    except StartupError as error:
        sys.exit(f"Error: {error}")
