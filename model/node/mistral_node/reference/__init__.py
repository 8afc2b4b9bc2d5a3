"""The reference as a server: `vllm_mistral.reference` computes, `batch` lets requests join and leave it between steps, `server` speaks HTTP."""
