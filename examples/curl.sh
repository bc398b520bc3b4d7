#!/usr/bin/env bash
# A client with curl and jq only. The server has an admin key and a folder of vectors:
#
#   STEER_ENGINE_ADMIN_KEYS=a-key-of-16-characters steer-engine serve smollm2-135m --steering-vectors vectors/
#   STEER_ENGINE_ADMIN_KEY=a-key-of-16-characters examples/curl.sh cheerful.safetensors
set -euo pipefail
url=${STEER_ENGINE_URL:-http://localhost:8000}/v1
file=$1
name=$(basename "${file%.*}")
admin=(-H "Authorization: Bearer ${STEER_ENGINE_ADMIN_KEY:?set it to an admin key of the server}")
model=$(curl -fsS "${admin[@]}" "$url/models" | jq -r '.data[0].id')

echo "== upload the vector, and a preset of it"
curl -fsS -X PUT --data-binary "@$file" "${admin[@]}" "$url/steering/vectors/$name" | jq -c '{name, digest}'
spec="{\"edits\": [{\"vector\": \"$name\", \"scale\": 0.3}]}"
curl -fsS -X PUT -d "$spec" "${admin[@]}" -H 'Content-Type: application/json' "$url/steering/presets/$name-soft" |
    jq -c '{name, digest}'

echo "== what a request would get"
curl -fsS -d "$spec" "${admin[@]}" -H 'Content-Type: application/json' "$url/steering/validate" | jq -c '{digest, rows, dose}'

complete() { # model, more fields
    curl -fsS "$url/completions" "${admin[@]}" -H 'Content-Type: application/json' \
        -d "{\"model\": \"$1\", \"prompt\": \"My day was\", \"max_tokens\": 20, \"temperature\": 0 $2}" |
        jq -c '[.choices[0].text, .steering.digest]'
}
echo "== plain, with the field, with the preset's name"
complete "$model" ''
complete "$model" ", \"steering\": $spec"
complete "$model:$name-soft" ''

echo "== delete both"
curl -fsS -X DELETE "${admin[@]}" "$url/steering/presets/$name-soft" | jq -c .name
curl -fsS -X DELETE "${admin[@]}" "$url/steering/vectors/$name" | jq -c '{name, in_flight}'
