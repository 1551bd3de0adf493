"""Models of public harnesses that ask a server. They import neither torch nor the rest of this
package.

So a harness keeps the environment that it wants: this repository on PYTHONPATH and the `openai`
package are enough.
"""
