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

{{- define "steer-engine.claim" -}}
{{- .Values.registry.existingClaim | default (printf "%s-vectors" (include "steer-engine.name" .)) -}}
{{- end -}}

{{- define "steer-engine.mostReplicas" -}}
{{- if .Values.autoscaling.enabled -}}{{ .Values.autoscaling.maxReplicas }}
{{- else if .Values.keda.enabled -}}{{ .Values.keda.maxReplicas }}
{{- else -}}{{ .Values.replicas }}{{- end -}}
{{- end -}}

{{- /* What a schema cannot say. */ -}}
{{- define "steer-engine.check" -}}
{{- if and .Values.autoscaling.enabled .Values.keda.enabled -}}
{{- fail "autoscaling and keda cannot both be enabled: two controllers would set the number of replicas" -}}
{{- end -}}
{{- $shared := or .Values.registry.readOnly (ne .Values.registry.accessMode "ReadWriteOnce") -}}
{{- if and (gt (include "steer-engine.mostReplicas" . | int) 1) (not .Values.registry.existingClaim) (not $shared) -}}
{{- fail "several replicas share one registry: registry.accessMode must be ReadWriteMany, or registry.readOnly true" -}}
{{- end -}}
{{- if and .Values.registry.readOnly .Values.secrets.admin -}}
{{- fail "a read-only registry cannot be changed: leave secrets.admin out" -}}
{{- end -}}
{{- if and .Values.registry.readOnly (not .Values.registry.existingClaim) -}}
{{- fail "a read-only registry must exist already: name it in registry.existingClaim" -}}
{{- end -}}
{{- end -}}
