{{- /* What a schema cannot say. */ -}}
{{- define "steer-engine.check" -}}
{{- $several := include "steer-engine.several" . -}}
{{- $registry := .Values.registry -}}
{{- if and .Values.autoscaling.enabled .Values.keda.enabled -}}
{{- fail "autoscaling and keda cannot both be enabled: two controllers would set the number of replicas" -}}
{{- end -}}
{{- if include "steer-engine.createsRegistry" . -}}
{{- $mode := include "steer-engine.registryMode" . -}}
{{- if and $several (not (has $mode (list "ReadWriteMany" "ReadOnlyMany"))) -}}
{{- fail (printf "several replicas share one registry, and its claim %s is %s: set registry.accessMode to ReadWriteMany for a new claim, name a claim of that mode in registry.existingClaim, or follow a URL with registry.mirror.url" (include "steer-engine.registryClaim" .) $mode) -}}
{{- end -}}
{{- if and (eq $mode "ReadWriteOncePod") (eq (.Values.updateStrategy.type | default "") "RollingUpdate") -}}
{{- fail "a new pod cannot mount a ReadWriteOncePod volume beside the old one: set updateStrategy.type to Recreate" -}}
{{- end -}}
{{- end -}}
{{- if and $registry.readOnly .Values.secrets.admin -}}
{{- fail "a read-only registry cannot be changed: leave secrets.admin out" -}}
{{- end -}}
{{- if and $registry.readOnly (not $registry.existingClaim) -}}
{{- fail "a read-only registry must exist already: name it in registry.existingClaim" -}}
{{- end -}}
{{- if and $registry.readOnly $registry.mirror.url -}}
{{- fail "registry.mirror writes its copies into the registry: set registry.readOnly to false" -}}
{{- end -}}
{{- if and $registry.mirror.url (not .Values.networkPolicy.allowEgress) .Values.networkPolicy.enabled (not (hasPrefix "file:" $registry.mirror.url)) -}}
{{- fail "registry.mirror reads a URL, and the network policy allows DNS only: set networkPolicy.allowEgress to true" -}}
{{- end -}}
{{- if and $registry.mirror.credentials (not $registry.mirror.url) -}}
{{- fail "registry.mirror.credentials are for registry.mirror.url: set it, or leave both out" -}}
{{- end -}}
{{- if and .Values.secrets.admin $several (not (include "steer-engine.registryClaim" .)) -}}
{{- fail "uploads would reach one replica only, since each has its own folder: leave secrets.admin out, or name a claim in registry.existingClaim" -}}
{{- end -}}
{{- if .Values.networkPolicy.enabled -}}
{{- if and (or .Values.ingress.enabled .Values.gateway.enabled) (not .Values.networkPolicy.from) -}}
{{- fail "the network policy admits this namespace only: name the namespace of the ingress controller or gateway in networkPolicy.from" -}}
{{- end -}}
{{- if and .Values.serviceMonitor.enabled (not .Values.networkPolicy.metricsFrom) -}}
{{- fail "the network policy would keep Prometheus out: name its namespace in networkPolicy.metricsFrom" -}}
{{- end -}}
{{- end -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.host) -}}
{{- fail "ingress.enabled needs ingress.host" -}}
{{- end -}}
{{- if and .Values.gateway.enabled (not .Values.gateway.parentRefs) -}}
{{- fail "gateway.enabled needs gateway.parentRefs: the name and namespace of an existing Gateway" -}}
{{- end -}}
{{- end -}}
