# SPDX-License-Identifier: Apache-2.0
# Each line fits the schema, lines of so many kinds are there, and a line that lacks a field or has one more does not fit.
# usage: validate.py SCHEMA LINES KINDS
import json
import sys

import jsonschema

schema = json.load(open(sys.argv[1], encoding="utf-8"))
jsonschema.Draft7Validator.check_schema(schema)
kinds = {}
validators = {}
for name, definition in schema["definitions"].items():
    if name.endswith("_line"):  # the kind is known, so a fault can be told without "none of 7 fits"
        validators[name[: -len("_line")]] = jsonschema.Draft7Validator({**definition, "definitions": schema["definitions"]})
whole = jsonschema.Draft7Validator(schema)
for number, text in enumerate(open(sys.argv[2], encoding="utf-8"), 1):
    line = json.loads(text)
    for fault in validators[line["kind"]].iter_errors(line):
        sys.exit(f"line {number} of kind {line['kind']}: {'/'.join(map(str, fault.path))}: {fault.message}")
    if line["kind"] in kinds:
        continue
    kinds[line["kind"]] = number
    whole.validate(line)
    for field in line:
        if whole.is_valid({key: value for key, value in line.items() if key != field}):
            sys.exit(f"a line of kind {line['kind']} fits without its field {field}")
    if whole.is_valid({**line, "more": 1}):
        sys.exit(f"a line of kind {line['kind']} fits with a field more")
if len(kinds) != int(sys.argv[3]):
    sys.exit(f"lines are of the kinds {sorted(kinds)}, which are not {sys.argv[3]}")
print(f"{number} lines of {len(kinds)} kinds fit the schema")
