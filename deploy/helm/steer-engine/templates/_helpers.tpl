{{- define "steer-engine.name" -}}
{{- printf "%s" .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}

{{- define "steer-engine.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "steer-engine.labels" -}}
{{ include "steer-engine.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "steer-engine.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (include "steer-engine.name" .) -}}
{{- end -}}

{{- define "steer-engine.image" -}}
{{- $build := ternary "cuda" "cpu" (gt (int .Values.gpus) 0) -}}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default (printf "%s-%s" .Chart.AppVersion $build)) -}}
{{- end -}}

{{- define "steer-engine.mostReplicas" -}}
{{- if .Values.autoscaling.enabled -}}{{ .Values.autoscaling.maxReplicas }}
{{- else if .Values.keda.enabled -}}{{ .Values.keda.maxReplicas }}
{{- else -}}{{ .Values.replicas }}{{- end -}}
{{- end -}}

{{- /* "yes" if there can be more than one replica. */ -}}
{{- define "steer-engine.several" -}}
{{- if gt (include "steer-engine.mostReplicas" . | int) 1 -}}yes{{- end -}}
{{- end -}}

{{- /* "yes" if this chart creates the claim of the registry. A mirror's copies need none. */ -}}
{{- define "steer-engine.createsRegistry" -}}
{{- if and .Values.registry.create (not .Values.registry.existingClaim) (not .Values.registry.mirror.url) -}}yes{{- end -}}
{{- end -}}

{{- /* Name of the registry's claim; empty if each pod has its own folder. */ -}}
{{- define "steer-engine.registryClaim" -}}
{{- if .Values.registry.existingClaim -}}{{ .Values.registry.existingClaim }}
{{- else if include "steer-engine.createsRegistry" . -}}{{ include "steer-engine.name" . }}-vectors{{- end -}}
{{- end -}}

{{- /* Access mode of the registry's claim: that of an installed claim, since it cannot change. */ -}}
{{- define "steer-engine.registryMode" -}}
{{- $installed := lookup "v1" "PersistentVolumeClaim" .Release.Namespace (include "steer-engine.registryClaim" .) -}}
{{- if .Values.registry.accessMode -}}{{ .Values.registry.accessMode }}
{{- else if $installed -}}{{ first $installed.spec.accessModes }}
{{- else -}}{{ ternary "ReadWriteMany" "ReadWriteOnce" (eq (include "steer-engine.several" .) "yes") }}{{- end -}}
{{- end -}}

{{- /* "yes" if this chart creates the claim of the cache: one replica uses it, or its mode is for several. */ -}}
{{- define "steer-engine.createsCache" -}}
{{- $shared := eq .Values.cache.accessMode "ReadWriteMany" -}}
{{- if and .Values.cache.create (not .Values.cache.existingClaim) (or $shared (not (include "steer-engine.several" .))) -}}yes{{- end -}}
{{- end -}}

{{- /* Name of the cache's claim; empty if each pod has its own folder. */ -}}
{{- define "steer-engine.cacheClaim" -}}
{{- if .Values.cache.existingClaim -}}{{ .Values.cache.existingClaim }}
{{- else if include "steer-engine.createsCache" . -}}{{ include "steer-engine.name" . }}-cache{{- end -}}
{{- end -}}

{{- /* One replica is replaced: a second pod would wait for its GPU, and on another node for its volumes. */ -}}
{{- define "steer-engine.strategy" -}}
{{- if .Values.updateStrategy -}}{{ toYaml .Values.updateStrategy }}
{{- else if include "steer-engine.several" . -}}
type: RollingUpdate
rollingUpdate: {maxSurge: 1, maxUnavailable: 0}
{{- else -}}
type: Recreate
{{- end -}}
{{- end -}}

{{- /* Paths that clients use; vLLM's /metrics, /tokenize and more stay closed. */ -}}
{{- define "steer-engine.paths" -}}
- /v1/chat/completions
- /v1/chat/completions/batch
- /v1/completions
- /v1/responses
- /v1/messages
- /v1/models
- /v1/steering
- /v1/steering/validate
{{- end -}}

{{- define "steer-engine.registryPaths" -}}
- /v1/steering/vectors
- /v1/steering/presets
{{- end -}}
