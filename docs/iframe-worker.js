// A browser starts no worker from a page on the disk. There the search runs in a hidden frame of the page instead, and needs
// neither a server nor a network. The plugin `offline` would load such a script from elsewhere; mkdocs.yml names this one.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      const inside = frame.contentWindow
      inside.document.open()
      inside.document.write("<!doctype html><body></body>")
      inside.document.close()
      // What the script inside posts is heard here
      inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      this.started = new Promise(resolve => {
        const script = inside.document.createElement("script")
        script.onload = () => resolve(inside)
        script.src = url
        inside.document.body.append(script)
      })
    }

    postMessage(data) {
      this.started.then(inside => inside.dispatchEvent(new inside.MessageEvent("message", { data })))
    }
  }
}
