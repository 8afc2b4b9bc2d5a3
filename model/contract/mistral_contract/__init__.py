"""What laptop and node agree on, in code that both import. Standard library only.

The laptop (`mistralctl`) and the node (`mistral_node`) never import each other. What both have to judge alike, each before it
spends something, is judged here: which architectures are served, what an adapter may be, which options of vLLM are open.
"""
